"""From image files of any kind to the squares that a model is trained on, as ADM does it.

Dhariwal & Nichol 2021 (guided-diffusion, image_datasets.py): halve with a box filter while the
short side is at least twice the target, resize bicubically, cut out. EXIF is left aside.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import BinaryIO, Protocol

import numpy as np

from mdt_jax.data import pictures
from mdt_jax.data.pipeline import UNREADABLE
from mdt_jax.runtime.files import reason

BOX, BICUBIC = 4, 3  # Pillow's own numbers
CROPS = ("center", "random")
STAND_INS = 100  # images after a damaged one that are tried in its place
LOOKED_AT = 16  # images of a set, for `Squares.losses`
GREY, SHRUNK = 16, 4  # more levels between channels are a colour; so many times is much
ENLARGED = 2**24  # the most pixels that a long picture is enlarged to before it is cut


def to_rgb(image):
    """A PIL.Image as RGB: grey repeated, alpha dropped, 16 bits scaled to 8.

    Raises ValueError for pixels of 32 bits, whose range nobody knows.
    """
    if image.mode.startswith("I"):  # I;16, I;16B, and I where Pillow widens 16 bits
        from PIL import Image

        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray((wide / 257 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def center_crop(image, size: int) -> np.ndarray:
    """A PIL.Image → its middle, uint8 [size, size] or [size, size, channels]."""
    return _square(image, size, size, lambda most: most // 2)


def random_crop(
    image, size: int, random: np.random.Generator, smallest: float = 0.8, largest: float = 1.0
) -> np.ndarray:
    """A PIL.Image → a square from anywhere in it, uint8 [size, size] or [size, size, channels].

    The square is `smallest` to `largest` of the image's short side.
    """
    least, most = int(np.ceil(size / largest)), int(np.ceil(size / smallest))
    short = int(random.integers(least, most + 1))
    return _square(image, short, size, lambda most: int(random.integers(most + 1)))


def _square(image, short: int, size: int, place: Callable[[int], int]) -> np.ndarray:
    """A square of `size` out of the image whose short side is resized to `short`.

    place: the most that the square may begin at → what it begins at, first from the top, then from
    the left.
    """
    while min(image.size) >= 2 * short:
        image = image.resize(tuple(side // 2 for side in image.size), resample=BOX)
    scale = short / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    top, left = place(height - size), place(width - size)
    if width * height <= max(ENLARGED, 4 * short**2):
        array = np.asarray(image.resize((width, height), resample=BICUBIC))
        return array[top : top + size, left : left + size]
    # A long picture would take gigabytes. Pixels may differ from those of the way above: Pillow's
    # box is float32, and it may take the axes, between which it rounds, in another order.
    across, down = image.width / width, image.height / height  # pixels of the file for one of ours
    right, bottom = min((left + size) * across, image.width), min((top + size) * down, image.height)
    box = (left * across, top * down, right, bottom)
    return np.asarray(image.resize((size, size), resample=BICUBIC, box=box))


class ImageFiles(Protocol):
    """Image files by number from 0, wherever they lie, with labels."""

    @property
    def classes(self) -> list[str]:
        """The names of the labels 0, 1, …; empty without labels."""
        ...

    @property
    def found(self) -> str:
        """How many images of how many classes there are, and what is left out."""
        ...

    @property
    def left_out(self) -> str:
        """What else lies there, in a line; empty where nothing does."""
        ...

    @property
    def contents(self) -> str:
        """What tells it from other sets, such as a list of all images and labels."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Image i, for messages."""
        ...

    def read(self, i: int) -> tuple[str | os.PathLike | BinaryIO, int]:
        """(path or content of image i, not decoded; label). Raises OSError or UserError."""
        ...


@dataclasses.dataclass(frozen=True)
class CroppedImages:
    """Image files as squares, a `pipeline.Source`.

    channels: 3, or 1 for grey. crop: one of CROPS. flip: mirror those whose u is below a half.
    stand_ins: how many of the images that follow a damaged one are tried in its place; 0: it is
    given as black.
    """

    files: ImageFiles
    size: int
    channels: int = 3
    crop: str = "center"
    flip: bool = False
    stand_ins: int = STAND_INS

    def __len__(self) -> int:
        return len(self.files)

    @property
    def classes(self) -> list[str]:
        return self.files.classes

    @property
    def identity(self) -> str:
        """SHA-256 of the list of images and labels, hexadecimal."""
        return hashlib.sha256(self.files.contents.encode(errors="replace")).hexdigest()

    def name(self, i: int) -> str:
        """For messages."""
        return self.files.name(i)

    def losses(self) -> list[str]:
        """What becomes of the images that may not be meant: those that are looked at lose colour or
        much of their size. Empty where they do not.
        """
        sides, coloured = [], 0
        for i in np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int)).tolist():
            try:
                with pictures.opened(self.files.read(i)[0]) as image:
                    sides.append(min(image.size))
                    if self.channels == 1:
                        small = np.asarray(to_rgb(image).resize((16, 16))).astype(int)
                        coloured += int(np.ptp(small, axis=-1).max() > GREY)
            except Exception:  # it is damaged, which is said when it is its turn
                continue
        lost = []
        if coloured:
            lost.append(
                f"{coloured} of {len(sides)} images looked at are in colour and become grey, since "
                "data.channels is 1"
            )
        short = float(np.median(sides)) if sides else 0
        if short >= SHRUNK * self.size:
            lost.append(
                f"images are shrunk {short / self.size:.0f} times: the short side of most is about "
                f"{short:.0f} pixels, and data.image_size is {self.size}"
            )
        return lost

    def why(self, i: int) -> str:
        """What is wrong with an image."""
        try:
            self._square(self.files.read(i)[0], 0.5)
        except Exception as error:
            return reason(error)
        return "it can be read now"

    def take(self, items: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """As `Source.take`, with "images" [n, size, size, channels] uint8.

        Black stands in where `stand_ins` is 0; an item is UNREADABLE where all stand-ins are
        damaged, too.
        """
        images = np.zeros((len(items), self.size, self.size, self.channels), np.uint8)
        labels, damaged = np.zeros(len(items), np.int32), np.full(len(items), -1, np.int64)
        for n, (item, draw) in enumerate(zip(items.tolist(), u.tolist(), strict=True)):
            for tried in range(min(self.stand_ins + 1, len(self))):
                file, label = self.files.read((item + tried) % len(self))
                try:
                    images[n] = self._square(file, draw)
                except Exception as error:  # Pillow raises many kinds for damaged files
                    if getattr(error, "errno", None) is not None or isinstance(error, MemoryError):
                        raise
                    damaged[n] = item
                else:
                    labels[n] = label if self.classes else 0
                    break
            else:
                damaged[n] = UNREADABLE - item if self.stand_ins else item
        return {"images": images, "labels": labels, "damaged": damaged}

    def _square(self, file, u: float) -> np.ndarray:
        with pictures.opened(file) as image:
            image = to_rgb(image) if self.channels == 3 else to_rgb(image).convert("L")
        if self.crop == "center":
            array = center_crop(image, self.size)
        else:
            array = random_crop(image, self.size, np.random.default_rng(int(u * 2**53)))
        array = array.reshape(self.size, self.size, self.channels)
        return array[:, ::-1] if self.flip and u < 0.5 else array
