"""Small sets of pictures in every form, and a small VAE, for tests of data and encoding."""

import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.weights import kinds, networks
from tests.models.common import random_params

VAE = AutoencoderKL(channels=(8, 8, 8, 8), layers=1, groups=4)
CLASSES = ["2", "9", "10"]


def write_pictures(folder: pathlib.Path, count: int = 24, seed: int = 0) -> pathlib.Path:
    """`count` JPEGs of three classes, each in a folder, of many sizes; no two are alike."""
    random = np.random.default_rng(seed)
    for n in range(count):
        width, height = random.integers(20, 70, 2)
        coarse = random.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        path = folder / CLASSES[n % 3] / f"{n:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def write_tar(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """The pictures of a folder as ILSVRC2012 has them: a tar of a tar for each class."""
    inner = path.parent / "inner"
    inner.mkdir()
    with tarfile.open(path, "w") as outer:
        for place in sorted(folder.iterdir()):
            with tarfile.open(inner / f"{place.name}.tar", "w") as part:
                for image in sorted(place.iterdir()):
                    part.add(image, image.name)
            outer.add(inner / f"{place.name}.tar", f"{place.name}.tar")
    return path


def write_parquet(folder: pathlib.Path, out: pathlib.Path, shards: int = 2, rows: int = 5) -> None:
    """The pictures of a folder in the same order, as the Hugging Face hub has them.

    shards: the number of parquet files; rows: of a row group.
    """
    import pyarrow as pa
    import pyarrow.parquet

    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    paths = sorted(folder.glob("*/*.jpg"))
    out.mkdir()
    for n, part in enumerate(np.array_split(np.array(paths), shards)):
        contents = [{"bytes": path.read_bytes(), "path": path.name} for path in part]
        labels = [CLASSES.index(path.parent.name) for path in part]
        table = pa.table({"image": contents, "label": labels}, schema)
        name = f"train-{n:05}-of-{shards:05}.parquet"
        pyarrow.parquet.write_table(table, out / name, row_group_size=rows)


def write_vae(path: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A VAE with random weights, 1/8 of the size and 4 channels."""
    networks.save(path, kinds.Weights(VAE, random_params(VAE, seed=seed)))
    return path
