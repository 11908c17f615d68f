"""A folder with everything that encoding needs, and what it gives."""

import pathlib

from mdt_jax import encode
from tests.conftest import run_here
from tests.small_data import write_pictures, write_vae

IMAGES = 52
SCALE = 1.02
SHARDS = "--shard_images=4"


def make_place(folder: pathlib.Path) -> pathlib.Path:
    """Write `pictures`, a `vae`, another one, and the finished `cache`; returns the folder."""
    write_pictures(folder / "pictures", IMAGES)
    write_vae(folder / "vae")
    write_vae(folder / "other", seed=1)
    write_vae(folder / "moved" / "vae")
    write_pictures(folder / "renamed", IMAGES)
    (folder / "renamed" / "9" / "001.jpg").rename(folder / "renamed" / "9" / "002.jpg")
    run_here(encode.main, *arguments(folder), f"--out={folder / 'cache'}", SHARDS)
    return folder


def arguments(folder: pathlib.Path, name: str = "folder", path: str = "pictures") -> list[str]:
    return [
        "--config=configs/xl2.py:smoke",
        f"--config.data.name={name}",
        f"--config.data.path={folder / path}",
        "--config.data.image_size=32",
        "--config.data.channels=3",
        "--config.model.num_classes=3",
        f"--config.vae.path={folder / 'vae'}",
        f"--config.vae.scale={SCALE}",
    ]


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
