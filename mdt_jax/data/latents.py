"""A cache of latents: the VAE's posterior of each image and of its mirror, in ArrayRecord shards.

A record is the label (int32, little-endian), then float16 [4, h, w, c]: mean and deviation of the
image, mean and deviation of its mirror. manifest.json records what the cache was made from, and the
CRC-32 of each record, which every read compares.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from mdt_jax.data.in_buckets import unreached
from mdt_jax.data.protocols import Status
from mdt_jax.runtime import buckets, files
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import file_sha256, is_text, read_json

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # the description of a cache that is being written
MOMENTS = np.dtype("<f2")
CRC = np.dtype("<u4")
AT_ONCE = 16  # requests to a bucket
VIEWS = 2  # the image and its mirror


def record_dtype(shape: tuple[int, int, int]) -> np.dtype:
    """The record of one image whose latents are [h, w, c]."""
    return np.dtype([("label", "<i4"), ("moments", MOMENTS, (2 * VIEWS, *shape))])


@dataclasses.dataclass(frozen=True)
class Latents:
    """A finished cache, a `Source`.

    manifest: the content of manifest.json; flip: read the mirror of the images whose u is below
    0.5.
    """

    folder: files.Path
    manifest: dict
    flip: bool = False

    def __len__(self) -> int:
        return sum(shard["records"] for shard in self.manifest["shards"])

    @property
    def classes(self) -> list[str]:
        """The names of the labels."""
        return self.manifest["classes"]

    @property
    def identity(self) -> str:
        """The identity of the images that were encoded."""
        return self.manifest["images_sha256"]

    def name(self, i: int) -> str:
        """The shard of record i and its number in that."""
        for shard in self.manifest["shards"]:
            if i < shard["records"]:
                return f"record {i} of {self.folder / shard['file']}"
            i -= shard["records"]
        raise IndexError(i)

    def why(self, i: int) -> str:
        """What to do about a record that cannot be read."""
        return "it is damaged or of another cache: check with python -m mdt_jax.encode … --verify"

    def take(self, items: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """As `Source.take`, with "mean" and "std"; a damaged record is UNREADABLE.

        Raises OSError where a bucket cannot be reached.
        """
        labels, moments, status = self.read(items)
        rows, view = np.arange(len(items)), np.where(self.flip & (u < 0.5), 2, 0)
        mean, std = moments[rows, view], moments[rows, view + 1]
        return {"mean": mean, "std": std, "labels": labels, "status": status}

    def read(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(labels [n] int32, moments [n, 4, h, w, c] float16, status [n] int8) of records."""
        dtype = record_dtype(self.manifest["latents"])
        labels, status = np.zeros(len(items), np.int32), np.zeros(len(items), np.int8)
        moments = np.zeros((len(items), *dtype["moments"].shape), MOMENTS)
        try:
            records = self._records.__getitems__(items.tolist())
        except Exception as error:  # which record it is shows when each is read alone
            self._check_reached(error)
            records = [self._read_one(item) for item in items.tolist()]
        for n, record in enumerate(records):
            checked = self._crcs[items[n]] in (-1, zlib.crc32(record))
            if checked and len(record) == dtype.itemsize:
                labels[n], moments[n] = np.frombuffer(record, dtype)[0]
            else:
                status[n] = Status.UNREADABLE
        return labels, moments, status

    @functools.cached_property
    def _crcs(self) -> np.ndarray:
        """CRC-32 of each record, [N] int64; −1 in shards of versions that did not record it."""
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

    def _read_one(self, item: int) -> bytes:
        try:
            return self._records[item]
        except Exception as error:  # of the kinds that ArrayRecord's C++ raises
            self._check_reached(error)
            return b""

    def _check_reached(self, error: Exception) -> None:
        """Raise OSError where the bucket is at fault, and not the record."""
        if files.in_bucket(self.folder) and (text := unreached(error)):
            raise OSError(text) from None


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over latents z drawn from posteriors, for their mean and deviation.

    records: the number of images; values: that of values of a channel, of both views; sum: Σ E[z]
    and squares: Σ E[z²] of each channel, [C] float64. In shards of versions that did not tell
    channels apart, all count as one.
    """

    records: int = 0
    values: float = 0.0
    sum: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    squares: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))

    @classmethod
    def of_moments(cls, moments: np.ndarray) -> "Sums":
        """The sums over moments [n, 4, h, w, c]."""
        axes, values = (0, 1, 2, 3), moments[:, ::2, :, :, 0].size
        sum_of_means = moments[:, ::2].sum(axes, dtype=np.float64)
        # E[z²] = mean² + std²
        return cls(
            len(moments), values, sum_of_means, np.square(moments, dtype=np.float64).sum(axes)
        )

    @classmethod
    def of_shards(cls, shards: Iterable[dict], shape: tuple[int, int, int]) -> "Sums":
        """The sums over shards of a manifest, of latents [h, w, c]."""
        total = cls()
        for shard in shards:
            of_channels, squares = (np.atleast_1d(shard[name]) for name in ("sum", "squares"))
            values = VIEWS * math.prod(shape) * shard["records"] / len(of_channels)
            total += cls(shard["records"], values, of_channels, squares)
        return total

    def to_json(self) -> dict:
        """What a shard's entry in the manifest has."""
        sums = {"sum": self.sum.tolist(), "squares": self.squares.tolist()}
        return {"records": self.records, **sums}

    def __add__(self, other: "Sums") -> "Sums":
        if not (self.values and other.values):
            return self if self.values else other
        if len(self.sum) != len(other.sum):
            return self._pooled() + other._pooled()
        return Sums(
            self.records + other.records,
            self.values + other.values,
            self.sum + other.sum,
            self.squares + other.squares,
        )

    def _pooled(self) -> "Sums":
        sums = (np.sum(each, keepdims=True) for each in (self.sum, self.squares))
        return Sums(self.records, self.values * len(self.sum), *sums)

    @property
    def mean(self) -> np.ndarray:
        """The mean of each channel, [C] float64."""
        return self.sum / max(self.values, 1)

    @property
    def std(self) -> np.ndarray:
        """The standard deviation of each channel, [C] float64."""
        return np.sqrt(np.maximum(self.squares / max(self.values, 1) - self.mean**2, 0))

    def deviation(
        self, scale: float = 1.0, shift: Sequence[float] = (), std: Sequence[float] = ()
    ) -> float:
        """The standard deviation of all values of scale·(z − shift)/std.

        shift, std: as of a VAE's norm. NaN where they tell channels apart, but the sums do not.
        """
        offset, factor = np.array(shift or 0.0), scale / np.array(std or 1.0)
        if max(offset.size, factor.size) > len(self.sum):
            return math.nan
        mean, deviation = (self.mean - offset) * factor, self.std * factor
        return math.sqrt(max(np.mean(deviation**2 + mean**2) - np.mean(mean) ** 2, 0.0))


def sums_of(manifest: dict) -> Sums:
    """The sums over all latents of a cache."""
    return Sums.of_shards(manifest["shards"], manifest["latents"])


def load(path: str | os.PathLike, flip: bool = False) -> Latents:
    """Open a finished cache. Raises UserError where there is none, or a shard changed its size."""
    folder = files.as_path(path)
    check_path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        buckets.check_bucket(folder)
        if files.exists(folder / UNFINISHED):
            raise UserError(f"{path} is not finished: run the same mdt_jax.encode again")
        raise UserError(f"data.path {path} holds no {MANIFEST}: python -m mdt_jax.encode makes it")
    found = has_shards(folder, manifest["shards"])
    damaged = [
        shard["file"] for shard, there in zip(manifest["shards"], found, strict=True) if not there
    ]
    if damaged:
        raise UserError(
            f"{path}: {damaged[0]} and {len(damaged) - 1} other shards are missing or cut short; "
            "run the same mdt_jax.encode again"
        )
    return Latents(folder, manifest, flip)


def check_path(folder: files.Path, what: str = "a cache of latents") -> None:
    """Raise UserError for a folder whose shards ArrayRecord could not write, or not read back.

    what: is written there.
    """
    full = str(files.absolute(folder))
    if "\n" in full or not is_text(full):
        raise UserError(
            f"{full} has a line break, or bytes that are no UTF-8, in its path, and {what} there "
            "cannot be read back; choose another name, or rename the folder"
        )


def check_shard(cache: Latents, number: int) -> Sums:
    """Read one shard through. Raises UserError for damage, and for values that are not finite."""
    shard = cache.manifest["shards"][number]
    path = cache.folder / shard["file"]
    sums = Sums()
    with _local(path) as copy:
        if file_sha256(copy) != shard["sha256"]:
            raise UserError(f"{path} is damaged: delete it and run the same mdt_jax.encode again")
        alone = Latents(copy.parent, {**cache.manifest, "shards": [shard]})
        for start in range(0, len(alone), 64):
            _, moments, status = alone.read(np.arange(start, min(start + 64, len(alone))))
            if status.any():
                raise UserError(f"{path} does not hold the {len(alone)} records of the manifest")
            sums += Sums.of_moments(moments)
    if not np.isfinite(sums.squares).all():
        raise UserError(f"{path} holds values that are not finite")
    return sums


@contextlib.contextmanager
def _local(path: files.Path) -> Iterator[pathlib.Path]:
    """A shard as a local file: itself on a disk, or a copy of the object, which is then removed."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mdt_jax-") as folder:
        copy = pathlib.Path(folder) / path.name
        with buckets.reading(path):
            buckets.client(path).get_file(str(path), str(copy))
        yield copy


def checksum(content: dict) -> str:
    """SHA-256 of all values except "checksum"."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: files.Path) -> dict | None:
    """The manifest of a finished cache; None where there is none. Raises UserError for damage."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    if manifest.get("checksum") != checksum(manifest):
        raise UserError(f"{folder / MANIFEST} is damaged, or was edited: encode anew")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} has the format {manifest.get('format')}, which this version cannot read"
        )
    return manifest


def has_shard(folder: files.Path, shard: dict) -> bool:
    """Whether a shard of a manifest is in the folder, with its size."""
    path = folder / shard["file"]
    try:
        with buckets.reading(path):
            size = path.stat().length if isinstance(path, epath.Path) else os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return False
    return size == shard["bytes"]


def has_shards(folder: files.Path, shards: Iterable[dict]) -> list[bool]:
    """`has_shard` of each; in a bucket several are asked for at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(functools.partial(has_shard, folder), shards))
