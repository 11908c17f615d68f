"""Crops of image files, as ADM makes them, and the data source of such crops.

Dhariwal & Nichol 2021 (guided-diffusion, image_datasets.py): halve with a box filter while the
short side is at least twice the target, resize bicubically, crop. A crop that is not square is made
in the same way: both sides are at least as long as the target's. The EXIF orientation is ignored.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from mdt_jax.data.image_files import ImageFiles
from mdt_jax.data.images import open_image, to_rgb
from mdt_jax.data.protocols import Status
from mdt_jax.runtime.files import reason

BOX, BICUBIC = 4, 3  # Pillow's own numbers
CROPS = ("center", "random")
STAND_INS = 100  # images after a damaged one that are tried in its place
SAMPLED = 16  # images that `CroppedImages.warnings` opens
GREY = 16  # a larger difference between channels is a colour
SHRUNK = 4  # reducing images this many times is worth a warning
MAX_ENLARGED = 2**24  # pixels; a longer image is cropped before it is enlarged


Sides = tuple[int, int]  # (height, width)


def center_crop(image, sides: Sides) -> np.ndarray:
    """The center of a PIL.Image: uint8 [H, W] or [H, W, channels], (H, W) = sides."""
    return _crop(image, sides, sides, lambda most: most // 2)


def random_crop(
    image, sides: Sides, random: np.random.Generator, smallest: float = 0.8, largest: float = 1.0
) -> np.ndarray:
    """A random part of a PIL.Image: uint8 [H, W] or [H, W, channels], (H, W) = sides.

    Its sides are `smallest` to `largest` of those of the largest part with their ratio.
    """
    height, width = sides
    low, high = int(np.ceil(height / largest)), int(np.ceil(height / smallest))
    whole = int(random.integers(low, high + 1))
    around = whole, whole * width / height
    return _crop(image, around, sides, lambda most: int(random.integers(most + 1)))


def _crop(
    image, around: tuple[float, float], sides: Sides, choose: Callable[[int], int]
) -> np.ndarray:
    """A part of `sides` from the image after it is resized to cover a rectangle `around` it.

    choose: largest possible offset → offset; called for the top, then for the left.
    """
    tall, wide = around
    while image.height >= 2 * tall and image.width >= 2 * wide:
        image = image.resize(tuple(side // 2 for side in image.size), resample=BOX)
    scale = max(tall / image.height, wide / image.width)
    width, height = (round(side * scale) for side in image.size)
    top, left = choose(height - sides[0]), choose(width - sides[1])
    if width * height <= max(MAX_ENLARGED, 4 * tall * wide):
        array = np.asarray(image.resize((width, height), resample=BICUBIC))
        return array[top : top + sides[0], left : left + sides[1]]
    # Resizing a whole long image would take gigabytes. The pixels may differ from those above by
    # rounding: Pillow's box is float32, and Pillow may resize the axes in the other order.
    across, down = image.width / width, image.height / height  # file pixels per resized pixel
    right = min((left + sides[1]) * across, image.width)
    bottom = min((top + sides[0]) * down, image.height)
    box = (left * across, top * down, right, bottom)
    return np.asarray(image.resize(sides[::-1], resample=BICUBIC, box=box))


@dataclasses.dataclass(frozen=True)
class CroppedImages:
    """Crops of image files, a `Source`.

    sides: (H, W) of a crop. channels: 3, or 1 for grey. crop: one of CROPS. flip: mirror the images
    whose u is below 0.5. stand_ins: how many of the images after a damaged one are tried in its
    place; with 0, a black image replaces it.
    """

    files: ImageFiles
    sides: Sides
    channels: int = 3
    crop: str = "center"
    flip: bool = False
    stand_ins: int = STAND_INS

    def __len__(self) -> int:
        return len(self.files)

    @property
    def classes(self) -> list[str]:
        """The names of the labels, as of the files."""
        return self.files.classes

    @property
    def identity(self) -> str:
        """SHA-256 of the list of images and labels, hexadecimal."""
        return hashlib.sha256(self.files.contents.encode(errors="replace")).hexdigest()

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return self.files.name(i)

    def why(self, i: int) -> str:
        """Why image i cannot be read."""
        try:
            self._read(self.files.read(i)[0], 0.5)
        except Exception as error:
            return reason(error)
        return "it can be read now"

    def take(self, items: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """As `Source.take`, with "images" [n, H, W, channels] uint8.

        An item is UNREADABLE where all of its `stand_ins` are damaged, too.
        """
        images = np.zeros((len(items), *self.sides, self.channels), np.uint8)
        labels, status = np.zeros(len(items), np.int32), np.zeros(len(items), np.int8)
        ahead = self.files.read_ahead(items.tolist())
        for n, (item, draw) in enumerate(zip(items.tolist(), u.tolist(), strict=True)):
            for candidate in range(item, item + min(self.stand_ins + 1, len(self))):
                candidate %= len(self)
                file, label = ahead.get(candidate) or self.files.read(candidate)
                try:
                    images[n] = self._read(file, draw)
                except Exception as error:  # Pillow raises many kinds for damaged files
                    if getattr(error, "errno", None) is not None or isinstance(error, MemoryError):
                        raise
                    status[n] = Status.REPLACED
                else:
                    labels[n] = label if self.classes else 0
                    break
            else:
                status[n] = Status.UNREADABLE if self.stand_ins else Status.REPLACED
        return {"images": images, "labels": labels, "status": status}

    def _read(self, file, u: float) -> np.ndarray:
        with open_image(file) as image:
            image = to_rgb(image) if self.channels == 3 else to_rgb(image).convert("L")
        if self.crop == "center":
            array = center_crop(image, self.sides)
        else:
            array = random_crop(image, self.sides, np.random.default_rng(int(u * 2**53)))
        array = array.reshape(*self.sides, self.channels)
        return array[:, ::-1] if self.flip and u < 0.5 else array

    def warnings(self) -> list[str]:
        """Losses that may not be intended: colour, or most of the resolution. One a line."""
        (height, width), short, shrunk, coloured = self.sides, [], [], 0
        for i in np.unique(np.linspace(0, len(self) - 1, SAMPLED).astype(int)).tolist():
            try:
                with open_image(self.files.read(i)[0]) as image:
                    short.append(min(image.size))
                    shrunk.append(min(image.height / height, image.width / width))
                    if self.channels == 1:
                        small = np.asarray(to_rgb(image).resize((16, 16))).astype(int)
                        coloured += int(np.ptp(small, axis=-1).max() > GREY)
            except Exception:  # a damaged image is reported when its batch is read
                continue
        lines = []
        if coloured:
            lines.append(
                f"{coloured} of {len(short)} images sampled are in colour and become grey, because "
                "data.channels is 1"
            )
        if short and (times := float(np.median(shrunk))) >= SHRUNK:
            lines.append(
                f"images are shrunk {times:.0f} times: their median short side is "
                f"{np.median(short):.0f} pixels, and data.image_size is {height}"
            )
        return lines
