"""A cache of latents: the VAE's posterior of each image and of its mirror, as ArrayRecord shards.

A record is the label (int32, little-endian), then float16 [4, h, w, c]: mean and deviation of the
image, mean and deviation of its mirror. manifest.json tells what they were made from and with, and
the CRC-32 of each record, which is compared whenever it is read.
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
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from mdt_jax import locks
from mdt_jax.data.pipeline import UNREADABLE
from mdt_jax.errors import DamagedError, UserError
from mdt_jax.files import beside, check_room, free, read_json, reason, settle, whole

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # what a cache in the making is of
OPTIONS = "group_size:1,uncompressed"  # read at random; compressing saves a few per cent
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
    manifest = _manifest(folder)
    if manifest is None:
        if (folder / UNFINISHED).exists():
            raise UserError(f"{path} is not finished: run the same mdt_jax.encode again")
        raise UserError(f"data.path {path} holds no {MANIFEST}: python -m mdt_jax.encode makes it")
    damaged = [shard["file"] for shard in manifest["shards"] if not _is_there(folder, shard)]
    if damaged:
        raise UserError(
            f"{path}: {damaged[0]} and {len(damaged) - 1} other shards are missing or cut short; "
            "run the same mdt_jax.encode again"
        )
    return Latents(folder, manifest, flip)


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
    if sha256(path) != shard["sha256"]:
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


def _checksum(manifest: dict) -> str:
    """SHA-256 of all else that it holds."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _manifest(folder: pathlib.Path) -> dict | None:
    """Of a finished cache; UserError where it is none or was changed since."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    if manifest.get("checksum") != _checksum(manifest):
        raise UserError(f"{folder / MANIFEST} is damaged, or was edited: encode anew")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} is of format {manifest.get('format')}, which this version cannot read"
        )
    return manifest


def _is_there(folder: pathlib.Path, shard: dict) -> bool:
    try:
        return os.stat(folder / shard["file"]).st_size == shard["bytes"]
    except (FileNotFoundError, NotADirectoryError):
        return False


def sha256(path: pathlib.Path) -> str:
    """Of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """UserError where the disk, or ArrayRecord for it, refuses to write a shard."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        text = f"{path} could not be written: {reason(error)}{free(path)}"
        raise UserError(f"{text}; finished shards are kept, the same command goes on") from None


@dataclasses.dataclass(frozen=True)
class Making:
    """A cache in the making, which any number of hosts can fill at once.

    what: all that it is of, `images`, `shard_images` and `latents` among it; `told` are the parts
    that change no byte: where things lay, and the scale, by which no latents are multiplied here.
    A shard is done when the JSON beside it is there; it is always the same images' and so always
    the same bytes.
    """

    folder: pathlib.Path
    what: dict
    told = ("source", "vae", "scale")

    @property
    def num_shards(self) -> int:
        return -(-self.what["images"] // self.what["shard_images"])

    def items(self, shard: int) -> np.ndarray:
        """The numbers of a shard's images."""
        size = self.what["shard_images"]
        return np.arange(shard * size, min((shard + 1) * size, self.what["images"]))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{self.folder} is a file, not a folder for latents") from None

    @contextlib.contextmanager
    def alone(self, part: tuple[int, int]) -> Iterator[None]:
        """Keep others from writing one part of the shards: (which, of how many).

        Raises UserError where another process writes it, or divides the shards otherwise.
        """
        self._make_folder()
        which, count = part
        ours = self.folder / f".part-{which + 1}-of-{count}.lock"
        with locks.held(ours, f"part {which + 1} of {count} of {self.folder}"):
            for path in self.folder.glob(".part-*.lock"):
                if not path.name.endswith(f"-of-{count}.lock"):
                    locks.check_free(path, str(self.folder))
            yield

    def start(self) -> bool:
        """Make the folder, or go on in it; whether all is done already.

        Of a finished cache, shards that were lost are to be made again. Raises UserError where the
        folder holds something else.
        """
        self._make_folder()
        # In this order, since other hosts may start or finish meanwhile.
        passing = (".tmp", ".lock")
        names = [path.name for path in self.folder.iterdir() if path.suffix not in passing]
        try:
            found = read_json(self.folder / UNFINISHED)
        except DamagedError as error:
            raise UserError(f"{error}; remove {self.folder}, and encode anew") from None
        manifest = _manifest(self.folder)
        found = manifest or found
        if found is None:
            if names:
                raise UserError(f"{self.folder} is neither empty nor a cache of latents")
            self._write(UNFINISHED, self.what)
            return False
        found = {"precision": self.what.get("precision"), **found}  # older ones do not tell
        other = [k for k, v in self.what.items() if k not in self.told and found.get(k) != v]
        if other:
            was, now = (str(each.get(other[0]))[:100] for each in (found, self.what))
            raise UserError(
                f"{self.folder} holds another cache: its {other[0]} is {was}, not {now}; "
                "choose another --out"
            )
        if manifest is None:
            return False
        if self.finished():
            self._tidy()
            return True
        for number, shard in enumerate(manifest["shards"]):
            if _is_there(self.folder, shard):
                self._note(number, shard)
        self._write(UNFINISHED, self.what)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        return False

    def finished(self) -> bool:
        """Whether there is a manifest, and every shard that it names."""
        shards = (_manifest(self.folder) or {}).get("shards", ())
        return bool(shards) and all(_is_there(self.folder, shard) for shard in shards)

    def done(self, shard: int) -> dict | None:
        """What was noted of a shard, if it is done."""
        try:
            noted = read_json(self.folder / self._sidecar(shard))
        except DamagedError:
            return None
        if noted is None or noted.pop("checksum", "") != _checksum(noted):
            return None
        return noted if _is_there(self.folder, noted) else None

    def write(self, shard: int, batches: Iterable[dict[str, np.ndarray]]) -> None:
        """A shard, whole or not at all; UserError where the disk is full.

        batches: "moments" [n, 4, h, w, c] float16 and "labels" [n] int32 of its images in order,
        and "damaged" [n]: where it is not −1, the number of an image that is left out.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.folder / self._file(shard)
        check_room(path, len(self.items(shard)) * record_bytes(self.what["latents"]))
        temporary = beside(path)
        damaged, crcs, summed = [], [], {"records": 0, "sum": 0.0, "squares": 0.0}
        try:
            with _writing(path):
                writer = ArrayRecordWriter(str(temporary), OPTIONS)
            for batch in batches:
                sound = batch["damaged"] == -1
                damaged += batch["damaged"][~sound].tolist()
                moments = batch["moments"][sound].astype(MOMENTS)
                summed = {name: summed[name] + part for name, part in sums(moments).items()}
                with _writing(path):
                    for label, values in zip(batch["labels"][sound], moments, strict=True):
                        record = label.astype(LABEL).tobytes() + values.tobytes()
                        writer.write(record)
                        crcs.append(zlib.crc32(record))
            with _writing(path):
                writer.close()
                noted = {
                    "file": path.name,
                    "bytes": os.stat(temporary).st_size,
                    "sha256": sha256(temporary),
                    "crc32": base64.b64encode(np.array(crcs, CRC).tobytes()).decode(),
                    "damaged": damaged,
                    **summed,
                }
                settle(temporary)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._note(shard, noted)

    def _note(self, shard: int, noted: dict) -> None:
        self._write(self._sidecar(shard), {**noted, "checksum": _checksum(noted)})

    def finish(self) -> dict | None:
        """Write the manifest and return it; None where shards of another host are not done."""
        noted = [self.done(shard) for shard in range(self.num_shards)]
        shards = [shard for shard in noted if shard is not None]
        if len(shards) < self.num_shards:
            return _manifest(self.folder)  # or another host has just finished
        manifest = {
            **(read_json(self.folder / UNFINISHED) or self.what),
            "latent_std": deviation(shards, self.what["latents"]),
            "shards": shards,
        }
        manifest["checksum"] = _checksum(manifest)
        try:
            self._write(MANIFEST, manifest)
        except UserError:  # unless another host has just written it, and tidied
            if _manifest(self.folder) is None:
                raise
        self._tidy()
        return manifest

    def _tidy(self) -> None:
        sidecars = [self.folder / self._sidecar(shard) for shard in range(self.num_shards)]
        left = self.folder.glob("*.tmp")  # by what was killed
        for path in [*sidecars, self.folder / UNFINISHED, *left]:
            path.unlink(missing_ok=True)

    def _file(self, shard: int) -> str:
        return f"latents-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def _sidecar(self, shard: int) -> str:
        return f"{self._file(shard)}.json"

    def _write(self, name: str, content: dict) -> None:
        with whole(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
