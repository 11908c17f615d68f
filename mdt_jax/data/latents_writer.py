"""Writing a cache of latents: shards, which any number of hosts can write, and the manifest."""

import base64
import contextlib
import dataclasses
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mdt_jax.data import latents
from mdt_jax.data.latents import MANIFEST, UNFINISHED, Sums
from mdt_jax.data.protocols import Status
from mdt_jax.runtime import files, locks
from mdt_jax.runtime.errors import DamagedError, UserError

OPTIONS = "group_size:1,uncompressed"  # for random access; compression saves a few per cent
# Fields of a description that change no byte of a shard: places, and the norm, which is not
# applied here.
UNCOMPARED = ("source", "vae", "scale", "shift", "std")
# Files of processes that write or have been killed: locks, files cut short.
PASSING = re.compile(r"\.part-.*|.*\.tmp")
KEPT = "; finished shards are kept, and the same command resumes"


@contextlib.contextmanager
def _write_errors(path: files.Path) -> Iterator[None]:
    """Turn a failure to write a shard, by the disk or by ArrayRecord, into a UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} could not be written: {files.reason(error)}{files.free(path)}{KEPT}"
        ) from None


@dataclasses.dataclass(frozen=True)
class CacheWriter:
    """A cache that is being written, perhaps by several hosts at once.

    description: the fields of the manifest that describe the cache, including `images`,
    `shard_images` and `latents`, [h, w, c]. A shard is finished when its sidecar, a JSON beside it,
    exists. A shard's bytes depend on its images alone.
    """

    folder: files.Path
    description: dict

    @property
    def num_shards(self) -> int:
        """The number of shards of the whole cache."""
        return -(-self.description["images"] // self.description["shard_images"])

    def items(self, shard: int) -> np.ndarray:
        """The numbers of a shard's images."""
        size = self.description["shard_images"]
        return np.arange(shard * size, min((shard + 1) * size, self.description["images"]))

    def _make_folder(self) -> None:
        latents.check_path(self.folder)
        try:
            if files.in_bucket(self.folder) and files.is_file(self.folder):
                raise FileExistsError
            files.make_folder(self.folder)
        except FileExistsError:
            raise UserError(f"{self.folder} is a file, not a folder for latents") from None

    @contextlib.contextmanager
    def lock(self, part: tuple[int, int]) -> Iterator[Callable[[], None]]:
        """Lock one part of the shards, (index, number of parts), against other processes.

        Yields a function that raises UserError where the lock was lost, as `locks.held` does.
        Raises UserError where another process writes this part, or divides the shards into another
        number of parts.
        """
        self._make_folder()
        index, count = part
        path = self.folder / f".part-{index + 1}-of-{count}.lock"
        with locks.held(path, f"part {index + 1} of {count} of {self.folder}") as check:
            for name in files.names_in(self.folder):
                other = re.fullmatch(r"\.part-\d+-of-(\d+)\.lock", name)
                if other and other[1] != str(count):
                    locks.check_free(self.folder / name, str(self.folder))
            yield check

    def start(self) -> bool:
        """Make the folder, or resume in it; returns whether the cache is finished.

        Lost shards of a finished cache can then be written again. Raises UserError where the folder
        holds anything else.
        """
        self._make_folder()
        # Listed before it is read, because other hosts may start or finish meanwhile.
        names = [name for name in files.names_in(self.folder) if not PASSING.fullmatch(name)]
        try:
            unfinished = files.read_json(self.folder / UNFINISHED)
        except DamagedError as error:
            raise UserError(f"{error}; remove {self.folder}, and encode anew") from None
        manifest = latents.read_manifest(self.folder)
        before = manifest or unfinished
        if before is None:
            if names:
                raise UserError(f"{self.folder} is neither empty nor a cache of latents")
            self._write(UNFINISHED, self.description)
            return False
        self._check_same(before)
        if manifest is None:
            return False
        if self.finished():
            self._tidy()
            return True
        there = latents.has_shards(self.folder, manifest["shards"])
        for number, shard in enumerate(manifest["shards"]):
            if there[number]:
                self._write_sidecar(number, shard)
        self._write(UNFINISHED, self.description)
        files.remove(self.folder / MANIFEST)
        return False

    def _check_same(self, before: dict) -> None:
        """Raise UserError where the folder holds a cache with another description."""
        # Older versions did not record the precision.
        before = {"precision": self.description.get("precision"), **before}
        for name, value in self.description.items():
            if name not in UNCOMPARED and before.get(name) != value:
                old, new = (str(each)[:100] for each in (before.get(name), value))
                raise UserError(
                    f"{self.folder} holds another cache: its {name} is {old}, not {new}; choose "
                    "another --out"
                )

    def finished(self) -> bool:
        """Whether the folder has a manifest and all of its shards."""
        shards = (latents.read_manifest(self.folder) or {}).get("shards", ())
        return bool(shards) and all(latents.has_shards(self.folder, shards))

    def done(self, shard: int) -> dict | None:
        """The sidecar of a finished shard; None where the shard must be written."""
        try:
            sidecar = files.read_json(self.folder / self._sidecar(shard))
        except DamagedError:
            return None
        if sidecar is None or sidecar.pop("checksum", "") != latents.checksum(sidecar):
            return None
        return sidecar if latents.has_shard(self.folder, sidecar) else None

    def sidecars(self, shards: Collection[int]) -> dict[int, dict | None]:
        """`done` of each shard; in a bucket several are asked for at once."""
        with ThreadPoolExecutor(latents.AT_ONCE) as pool:
            return dict(zip(shards, pool.map(self.done, shards), strict=True))

    def write(self, shard: int, batches: Iterable[dict[str, np.ndarray]]) -> None:
        """Write a shard atomically. Raises UserError where the disk is full.

        batches: "moments" [n, 4, h, w, c] float16, "labels" [n] int32, "items" [n] and "status" [n]
        of the shard's images in order. Only images with the status READ are written.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.folder / self._file(shard)
        dtype = latents.record_dtype(self.description["latents"])
        files.check_room(path, len(self.items(shard)) * dtype.itemsize)
        damaged, crcs, sums, sidecar = [], [], Sums(), {}
        try:
            with files.atomic_write(path) as temporary:
                with _write_errors(path):
                    writer = ArrayRecordWriter(str(temporary), OPTIONS)
                for batch in batches:
                    read = batch["status"] == Status.READ
                    damaged += batch["items"][~read].tolist()
                    moments = batch["moments"][read].astype(latents.MOMENTS)
                    sums += Sums.of_moments(moments)
                    records = np.zeros(len(moments), dtype)
                    records["label"], records["moments"] = batch["labels"][read], moments
                    with _write_errors(path):
                        for record in records:
                            writer.write(record.tobytes())
                            crcs.append(zlib.crc32(record.tobytes()))
                with _write_errors(path):
                    writer.close()
                    sidecar = {
                        "file": path.name,
                        "bytes": os.stat(temporary).st_size,
                        "sha256": files.file_sha256(temporary),
                        "crc32": base64.b64encode(np.array(crcs, latents.CRC).tobytes()).decode(),
                        "damaged": damaged,
                        **sums.to_json(),
                    }
        except UserError as error:
            if not sidecar:
                raise
            raise UserError(f"{error}{KEPT}") from None  # all is written, but not in its place
        self._write_sidecar(shard, sidecar)

    def finish(self) -> dict | None:
        """Write the manifest and return it; None where other hosts have not finished."""
        sidecars = self.sidecars(range(self.num_shards)).values()
        shards = [sidecar for sidecar in sidecars if sidecar is not None]
        if len(shards) < self.num_shards:
            return latents.read_manifest(self.folder)  # another host may just have finished
        sums = Sums.of_shards(shards, self.description["latents"])
        manifest = {
            **(files.read_json(self.folder / UNFINISHED) or self.description),
            "latent_std": sums.deviation(),
            "channel_mean": sums.mean.tolist(),
            "channel_std": sums.std.tolist(),
            "shards": shards,
        }
        manifest["checksum"] = latents.checksum(manifest)
        try:
            self._write(MANIFEST, manifest)
        except UserError:  # another host may just have written it, and tidied
            if latents.read_manifest(self.folder) is None:
                raise
        self._tidy()
        return manifest

    def _tidy(self) -> None:
        """Remove everything but the shards and the manifest."""
        own = {UNFINISHED, *(self._sidecar(shard) for shard in range(self.num_shards))}
        for name in files.names_in(self.folder):
            if name in own or name.endswith(".tmp"):  # the latter are of killed processes
                files.remove(self.folder / name)

    def _file(self, shard: int) -> str:
        return f"latents-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def _sidecar(self, shard: int) -> str:
        return f"{self._file(shard)}.json"

    def _write_sidecar(self, shard: int, content: dict) -> None:
        self._write(self._sidecar(shard), {**content, "checksum": latents.checksum(content)})

    def _write(self, name: str, content: dict) -> None:
        with files.atomic_write(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
