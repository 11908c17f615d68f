"""A cache of latents: the VAE's posterior of each image and of its mirror, as ArrayRecord shards.

A record is the label (int32, little-endian), then float16 [4, h, w, c]: mean and deviation of the
image, mean and deviation of its mirror. manifest.json tells what they were made from and with, and
the CRC-32 of each record, which is compared whenever it is read.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import zlib

import numpy as np

from mdt_jax.data.pipeline import UNREADABLE
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import file_sha256, is_text, read_json

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # what a cache in the making is of
LABEL = np.dtype("<i4")
MOMENTS = np.dtype("<f2")
CRC = np.dtype("<u4")
VIEWS = 2  # the image and its mirror


@dataclasses.dataclass(frozen=True)
class Latents:
    """A finished cache, a `pipeline.Source`.

    manifest: its content; flip: take the mirror where u is below a half.
    """

    folder: pathlib.Path
    manifest: dict
    flip: bool = False

    def __len__(self) -> int:
        return sum(shard["records"] for shard in self.manifest["shards"])

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    @property
    def identity(self) -> str:
        """As of the images that it was made of."""
        return self.manifest["images_sha256"]

    def name(self, i: int) -> str:
        """For messages."""
        for shard in self.manifest["shards"]:
            if i < shard["records"]:
                return f"record {i} of {self.folder / shard['file']}"
            i -= shard["records"]
        raise IndexError(i)

    def why(self, i: int) -> str:
        """What to do about a record that cannot be read."""
        return "it is damaged or of another cache: python -m mdt_jax.encode … --verify tells"

    def take(self, items: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """As `Source.take`, with "mean" and "std"; nothing stands in for what is damaged."""
        height, width, channels = self.manifest["latents"]
        size = height * width * channels
        moments = np.zeros((len(items), 2, height, width, channels), MOMENTS)
        labels, damaged = np.zeros(len(items), np.int32), np.full(len(items), -1, np.int64)
        try:
            records = self._records.__getitems__(items.tolist())
        except Exception:  # which one it is, is told by reading them one by one
            records = [self._one(item) for item in items.tolist()]
        for n, record in enumerate(records):
            other = self._crcs[items[n]] not in (-1, zlib.crc32(record))
            if other or len(record) != record_bytes(self.manifest["latents"]):
                damaged[n] = UNREADABLE - items[n]
                continue
            labels[n] = np.frombuffer(record, LABEL, 1)[0]
            skipped = 2 * size * int(self.flip and u[n] < 0.5)
            offset = LABEL.itemsize + skipped * MOMENTS.itemsize
            moments[n].reshape(-1)[:] = np.frombuffer(record, MOMENTS, 2 * size, offset)
        return {"mean": moments[:, 0], "std": moments[:, 1], "labels": labels, "damaged": damaged}

    @functools.cached_property
    def _crcs(self) -> np.ndarray:
        """CRC-32 of each record, [N] int64; −1 of shards from before these were noted."""
        known = [
            np.frombuffer(base64.b64decode(shard["crc32"]), CRC).astype(np.int64)
            if "crc32" in shard
            else np.full(shard["records"], -1)
            for shard in self.manifest["shards"]
        ]
        return np.concatenate([np.zeros(0, np.int64), *known])

    @functools.cached_property
    def _records(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        shards = self.manifest["shards"]
        paths = [f"{self.folder / s['file']}[0:{s['records']}]" for s in shards if s["records"]]
        return ArrayRecordDataSource(paths)

    def _one(self, item: int) -> bytes:
        try:
            return self._records[item]
        except Exception:  # of the kinds that ArrayRecord's C++ has
            return b""


def record_bytes(shape: tuple[int, int, int]) -> int:
    """Of one image, whose latents are [h, w, c]."""
    return LABEL.itemsize + VIEWS * 2 * math.prod(shape) * MOMENTS.itemsize


def load(path: str | os.PathLike, flip: bool = False) -> Latents:
    """A finished cache; UserError where there is none, or a shard is not as long as it was."""
    folder = pathlib.Path(path)
    check_path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / UNFINISHED).exists():
            raise UserError(f"{path} is not finished: run the same mdt_jax.encode again")
        raise UserError(f"data.path {path} holds no {MANIFEST}: python -m mdt_jax.encode makes it")
    damaged = [shard["file"] for shard in manifest["shards"] if not is_there(folder, shard)]
    if damaged:
        raise UserError(
            f"{path}: {damaged[0]} and {len(damaged) - 1} other shards are missing or cut short; "
            "run the same mdt_jax.encode again"
        )
    return Latents(folder, manifest, flip)


def check_path(folder: pathlib.Path) -> None:
    """Raise UserError for a folder whose shards ArrayRecord could not write, or not read back."""
    full = str(folder.absolute())
    if "\n" in full or not is_text(full):
        raise UserError(
            f"{full} has a line break, or bytes that are no UTF-8, in its path, and a cache "
            "of latents there cannot be read back; choose another name, or rename the folder"
        )


def sums(moments: np.ndarray) -> dict[str, float]:
    """Of [n, 4, h, w, c]: "records", "sum" and "squares", of which `deviation` is made."""
    return {
        "records": len(moments),
        "sum": float(moments[:, ::2].sum(dtype=np.float64)),
        "squares": float(np.square(moments, dtype=np.float64).sum()),  # E[z²] = mean² + std²
    }


def deviation(shards: list[dict], shape: tuple[int, int, int]) -> float:
    """Standard deviation of all values of latents [h, w, c] drawn from the posteriors in shards."""
    values = VIEWS * math.prod(shape) * sum(shard["records"] for shard in shards)
    mean, square = (sum(shard[k] for shard in shards) / max(values, 1) for k in ("sum", "squares"))
    return math.sqrt(max(square - mean**2, 0.0))


def measure(cache: Latents, number: int) -> dict:
    """What one shard holds: "records", "sum", "squares", and "wrong": "" or what is."""
    shard, path = (
        cache.manifest["shards"][number],
        cache.folder / cache.manifest["shards"][number]["file"],
    )
    if file_sha256(path) != shard["sha256"]:
        return {"wrong": f"{path} is damaged: delete it and run the same mdt_jax.encode again"}
    alone = Latents(cache.folder, {**cache.manifest, "shards": [shard]}, flip=True)
    summed = {"records": 0, "sum": 0.0, "squares": 0.0}
    for start in range(0, len(alone), 64):
        items = np.arange(start, min(start + 64, len(alone)))
        # The image and its mirror.
        views = [alone.take(items, u) for u in (np.ones(len(items)), np.zeros(len(items)))]
        if (views[0]["damaged"] != -1).any():
            return {"wrong": f"{path} does not hold the {len(alone)} records that it should"}
        moments = np.stack([view[name] for view in views for name in ("mean", "std")], axis=1)
        summed = {name: summed[name] + part for name, part in sums(moments).items()}
    wrong = "" if math.isfinite(summed["squares"]) else f"{path} holds values that are not finite"
    return {**summed, "wrong": wrong}


def checksum(manifest: dict) -> str:
    """SHA-256 of all else that it holds."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: pathlib.Path) -> dict | None:
    """Of a finished cache; UserError where it is none or was changed since."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    if manifest.get("checksum") != checksum(manifest):
        raise UserError(f"{folder / MANIFEST} is damaged, or was edited: encode anew")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} is of format {manifest.get('format')}, which this version cannot read"
        )
    return manifest


def is_there(folder: pathlib.Path, shard: dict) -> bool:
    try:
        return os.stat(folder / shard["file"]).st_size == shard["bytes"]
    except (FileNotFoundError, NotADirectoryError):
        return False
