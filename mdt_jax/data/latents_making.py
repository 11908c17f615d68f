"""A cache of latents in the making: shards that any number of hosts write, and the manifest."""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from mdt_jax.data.latents import (
    CRC,
    LABEL,
    MANIFEST,
    MOMENTS,
    UNFINISHED,
    check_path,
    checksum,
    deviation,
    is_there,
    read_manifest,
    record_bytes,
    sums,
)
from mdt_jax.runtime import locks
from mdt_jax.runtime.errors import DamagedError, UserError
from mdt_jax.runtime.files import (
    atomic_write,
    check_room,
    file_sha256,
    free,
    fsync,
    read_json,
    reason,
    temp_path,
)

OPTIONS = "group_size:1,uncompressed"  # read at random; compressing saves a few per cent


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """UserError where the disk, or ArrayRecord for it, refuses to write a shard."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        text = f"{path} could not be written: {reason(error)}{free(path)}"
        raise UserError(f"{text}; finished shards are kept, the same command goes on") from None


@dataclasses.dataclass(frozen=True)
class CacheWriter:
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
        check_path(self.folder)
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
        manifest = read_manifest(self.folder)
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
            if is_there(self.folder, shard):
                self._note(number, shard)
        self._write(UNFINISHED, self.what)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        return False

    def finished(self) -> bool:
        """Whether there is a manifest, and every shard that it names."""
        shards = (read_manifest(self.folder) or {}).get("shards", ())
        return bool(shards) and all(is_there(self.folder, shard) for shard in shards)

    def done(self, shard: int) -> dict | None:
        """What was noted of a shard, if it is done."""
        try:
            noted = read_json(self.folder / self._sidecar(shard))
        except DamagedError:
            return None
        if noted is None or noted.pop("checksum", "") != checksum(noted):
            return None
        return noted if is_there(self.folder, noted) else None

    def write(self, shard: int, batches: Iterable[dict[str, np.ndarray]]) -> None:
        """A shard, whole or not at all; UserError where the disk is full.

        batches: "moments" [n, 4, h, w, c] float16 and "labels" [n] int32 of its images in order,
        and "damaged" [n]: where it is not −1, the number of an image that is left out.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.folder / self._file(shard)
        check_room(path, len(self.items(shard)) * record_bytes(self.what["latents"]))
        temporary = temp_path(path)
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
                    "sha256": file_sha256(temporary),
                    "crc32": base64.b64encode(np.array(crcs, CRC).tobytes()).decode(),
                    "damaged": damaged,
                    **summed,
                }
                fsync(temporary)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._note(shard, noted)

    def _note(self, shard: int, noted: dict) -> None:
        self._write(self._sidecar(shard), {**noted, "checksum": checksum(noted)})

    def finish(self) -> dict | None:
        """Write the manifest and return it; None where shards of another host are not done."""
        noted = [self.done(shard) for shard in range(self.num_shards)]
        shards = [shard for shard in noted if shard is not None]
        if len(shards) < self.num_shards:
            return read_manifest(self.folder)  # or another host has just finished
        manifest = {
            **(read_json(self.folder / UNFINISHED) or self.what),
            "latent_std": deviation(shards, self.what["latents"]),
            "shards": shards,
        }
        manifest["checksum"] = checksum(manifest)
        try:
            self._write(MANIFEST, manifest)
        except UserError:  # unless another host has just written it, and tidied
            if read_manifest(self.folder) is None:
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
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
