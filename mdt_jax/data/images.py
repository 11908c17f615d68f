"""Image files and pixels: opening, RGB, numbers and back, grids, PNG and GIF files."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, fetched

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names of the formats that are read. Pillow knows dozens more, goes by content whatever
# the suffix, and hands PostScript to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
MAX_SIDE = 65_535  # pixels; the longest side of a JPEG
MAX_PIXELS = 2**27  # 0.4 GB as RGB
# The rule of `to_uint8`, recorded with samples so that their figures can be compared.
UINT8_RULE = "clip((x + 1)*127.5, 0, 255), truncated"


@contextlib.contextmanager
def open_image(file: str | os.PathLike | BinaryIO) -> Iterator["Image.Image"]:
    """A PIL.Image of a path or an open file; only its header has been read.

    Raises OSError where the file cannot be opened, and ValueError where it is no regular file, has
    none of FORMATS, or exceeds MAX_SIDE or MAX_PIXELS. Decoding a damaged image may raise any
    exception of Pillow's readers.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, (str, os.PathLike)):
        file = fetched(file)
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("it is no regular file")  # opening a pipe would wait for a writer
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"cannot identify image: it is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        raise ValueError(f"it is too large: more than {MAX_PIXELS} pixels") from None
    with image:
        width, height = image.size
        size = f"{height}×{width} pixels"
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"it is too long: {size}; the longest side may have {MAX_SIDE}")
        if width * height > MAX_PIXELS:
            raise ValueError(f"it is too large: {size}; at most {MAX_PIXELS} are read")
        if not width * height:
            raise ValueError("it has no pixels")
        yield image


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Convert any mode to RGB: grey is repeated, alpha is dropped, 16 bits are scaled to 8.

    Raises ValueError for 32-bit and floating-point pixels, whose range is unknown.
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


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0…255 → float32 in [−1, 1]: x/127.5 − 1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """float in [−1, 1] → uint8: (x + 1)·127.5, clamped, then truncated as published."""
    return np.clip((np.asarray(x, np.float32) + 1) * 127.5, 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """Tile [N, H, W, C] uint8, enlarged `scale` times, to one image [rows·H', columns·W', C]."""
    images = np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)
    rows = -(-len(images) // columns)
    missing = rows * columns - len(images)
    images = np.pad(images, [(0, missing), (0, scale), (0, scale), (0, 0)])
    _, height, width, channels = images.shape
    tiled = images.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    tiled = tiled.reshape(rows * height, columns * width, channels)
    return tiled[:-scale, :-scale]  # no border at the right and the bottom


def _enlargement(height: int) -> int:
    """How many times a grid enlarges images of this height."""
    return max(1, 32 // height)


def check_grid(path: str | os.PathLike, count: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError where a grid of `count` images (H, W, C) would exceed MAX_PIXELS."""
    height, width, _ = shape
    pixels = count * (height + 1) * (width + 1) * _enlargement(height) ** 2
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{path}: a grid of {count} images would have {pixels:.2g} pixels, more than "
            f"{MAX_PIXELS}; draw fewer"
        )


def save_grid(
    path: str | os.PathLike, images: np.ndarray, columns: int = 10, note: str = ""
) -> None:
    """Write a PNG with a grid of [N, H, W, C] uint8, C 1 or 3; small images are enlarged.

    note: as in `save_image`.
    """
    save_image(path, grid(images, columns, _enlargement(images.shape[1])), note)


def save_image(path: str | os.PathLike, image: np.ndarray, note: str = "") -> None:
    """Write [H, W, C] uint8, C 1 or 3, as a PNG, atomically.

    note: how the image was made, stored in the file as the text `Comment`.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if note:
        info.add_itxt("Comment", note)
    with atomic_write(path) as temporary:
        _to_pillow(image).save(temporary, format="PNG", pnginfo=info)


def save_animation(path: str, frames: np.ndarray, note: str = "", seconds: float = 4.0) -> None:
    """Write [F, N, H, W, C] uint8 as a looping GIF, atomically; each frame is a grid of N.

    note: as in `save_image`, stored as the file's comment. seconds: the duration of all frames;
    the last one stays one second longer.
    """
    scale = _enlargement(frames.shape[2])
    pictures = [_to_pillow(grid(images, columns=10, scale=scale)) for images in frames]
    # GIF durations are multiples of 10 ms, and players do not follow less than 20 ms.
    each = max(20, round(1000 * seconds / len(frames)) // 10 * 10)
    durations = [each] * (len(pictures) - 1) + [each + 1000]
    with atomic_write(path) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:],
            duration=durations, loop=0, comment=note,
        )  # fmt: skip


def _to_pillow(image: np.ndarray) -> "Image.Image":
    from PIL import Image

    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
