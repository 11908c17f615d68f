"""Pixels: to numbers and back, and pictures on disk."""

import numpy as np

from mdt_jax.files import whole


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0…255 → float32 in [−1, 1]: x/127.5 − 1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


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


def save_grid(path: str, images: np.ndarray, columns: int = 10, note: str = "") -> None:
    """Write [N, H, W, C] uint8, C 1 or 3, as a PNG, small images enlarged; whole or not at all.

    note: how they came about, kept in the file as the text `Comment`.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture = grid(images, columns, scale=max(1, 32 // images.shape[1]))
    info = PngInfo()
    if note:
        info.add_itxt("Comment", note)
    picture = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    with whole(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def save_npz(path: str, images: np.ndarray, labels: np.ndarray, note: str = "") -> None:
    """Write arr_0 uint8 [N, H, W, C] and arr_1 labels, as ADM has it; whole or not at all.

    note: how they came about, kept in the file as the string `note`.
    """
    arrays = {"arr_0": images, "arr_1": labels, **({"note": np.array(note)} if note else {})}
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
