"""Pixels: to numbers and back, and pictures on disk."""

import os

import numpy as np

from mdt_jax.data.pictures import MAX_PIXELS
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, save_arrays


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0…255 → float32 in [−1, 1]: x/127.5 − 1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


# What `to_uint8` does, for whoever compares figures of samples.
UINT8_RULE = "clip((x + 1)*127.5, 0, 255), truncated"


def to_uint8(x: np.ndarray) -> np.ndarray:
    """float in [−1, 1] → uint8: (x + 1)·127.5, clamped, then truncated as published."""
    return np.clip((np.asarray(x, np.float32) + 1) * 127.5, 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """[N, H, W, C] uint8 → one picture [rows·H', columns·W', C], images enlarged `scale` times."""
    images = np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)
    images = np.pad(images, [(0, 0), (0, scale), (0, scale), (0, 0)])
    rows = -(-len(images) // columns)
    missing = rows * columns - len(images)
    images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
    _, height, width, channels = images.shape
    tiled = images.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = tiled.reshape(rows * height, columns * width, channels)
    return picture[:-scale, :-scale]


def save_grid(
    path: str | os.PathLike, images: np.ndarray, columns: int = 10, note: str = ""
) -> None:
    """Write [N, H, W, C] uint8, C 1 or 3, as a PNG, small images enlarged; whole or not at all.

    note: how they came about, kept in the file as the text `Comment`.
    """
    save_image(path, grid(images, columns, scale=_enlarge(images)), note)


def check_grid(path: str | os.PathLike, count: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError where a grid of `count` images (H, W, C) would be too large a picture."""
    height, width, _ = shape
    pixels = count * (height + 1) * (width + 1) * max(1, 32 // height) ** 2
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{path}: a grid of {count} images would have {pixels:.2g} pixels, and {MAX_PIXELS} "
            "are the most; draw fewer"
        )


def _enlarge(images: np.ndarray) -> int:
    return max(1, 32 // images.shape[-3])


def save_image(path: str | os.PathLike, image: np.ndarray, note: str = "") -> None:
    """Write [H, W, C] uint8, C 1 or 3, as a PNG; whole or not at all. note: as in `save_grid`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if note:
        info.add_itxt("Comment", note)
    with atomic_write(path) as temporary:
        _picture(image).save(temporary, format="PNG", pnginfo=info)


def save_animation(path: str, frames: np.ndarray, note: str = "", seconds: float = 4.0) -> None:
    """Write [F, N, H, W, C] uint8 as a GIF that repeats, each frame a grid of N; whole or not.

    note: how they came about, kept as the file's comment. seconds: how long all frames take; the
    last one stays for one more.
    """
    pictures = [_picture(grid(images, columns=10, scale=_enlarge(frames))) for images in frames]
    # A GIF's clock ticks in hundredths of a second, and players do not follow less than two.
    each = max(20, round(1000 * seconds / len(frames)) // 10 * 10)
    lasting = [each] * (len(pictures) - 1) + [each + 1000]
    with atomic_write(path) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=lasting,
            loop=0, comment=note,
        )  # fmt: skip


def _picture(image: np.ndarray):
    from PIL import Image

    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def save_npz(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write arr_0 uint8 [N, H, W, C] and arr_1 labels, as ADM has it; whole or not at all."""
    save_arrays(path, {"arr_0": images, "arr_1": labels})
