"""The images in parquet shards: read a row group at a time, or unpacked once for random reads.

A row group is the smallest part of a shard that pyarrow reads, and may hold 1,000 images. Reading
one for each image would be far too slow. `unpack` therefore copies the images of a shard to an
ArrayRecord file beside it. Record 0 is a description of the shard, and record 1 + n is row n.
"""

import bisect
import collections
import contextlib
import dataclasses
import glob
import itertools
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

from mdt_jax.data.in_buckets import copy_command
from mdt_jax.data.latents import check_path
from mdt_jax.data.latents_writer import OPTIONS
from mdt_jax.runtime import buckets, files, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log, progress_bar

SUFFIX = ".array_record"  # appended to a shard's name
KEPT = 2**26  # bytes of row groups in memory; but at least two row groups
WAIT = 1.0  # seconds between two looks at what other processes unpack
_lock = threading.Lock()
_recent: collections.OrderedDict[tuple, Any] = collections.OrderedDict()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A parquet file, and the image column to read from it.

    column: with ".bytes" where it is a struct. size: of the file, bytes. version: changes with the
    content. groups: the number of rows of each row group. images: the bytes of all images.
    """

    path: files.Path
    column: str
    size: int
    version: str
    groups: tuple[int, ...]
    images: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(self.groups)

    @property
    def unpacked(self) -> pathlib.Path:
        """The file that `unpack` writes, of a shard on a disk."""
        return pathlib.Path(self.path).with_name(self.path.name + SUFFIX)

    @property
    def description(self) -> bytes:
        """Record 0 of `unpacked`: what tells whether it was made from this shard."""
        fields = {"column": self.column, "bytes": self.size, "version": self.version}
        return json.dumps({"format": 1, **fields, "rows": self.rows}).encode()

    def read(self, group: int) -> Any:
        """The images of a row group: a pyarrow ChunkedArray. Raises UserError for damage."""
        import pyarrow

        with damage(f"{self.path}, row group {group},"), open_shard(self.path) as file:
            table = file.read_row_group(group, columns=[self.column])
            column = table.flatten().column(0)
            if len(column) != self.groups[group]:
                raise ValueError(f"it has {len(column)} rows instead of {self.groups[group]}")
        # Reading takes several times the memory of the images, which pyarrow would keep.
        pyarrow.default_memory_pool().release_unused()
        return column


def _read_recent(shard: Shard, group: int) -> Any:
    """As `Shard.read`, but keeps the row groups read last."""
    with _lock:  # so that two threads do not read the same row group
        key = shard.path, shard.version, group
        if key not in _recent:
            images = shard.read(group)
            while len(_recent) > 1 and sum(each.nbytes for each in _recent.values()) > KEPT:
                _recent.popitem(last=False)
            _recent[key] = images
        _recent.move_to_end(key)
        return _recent[key]


@contextlib.contextmanager
def open_shard(path: files.Path) -> Iterator:
    """A pyarrow ParquetFile, which compares the checksums of pages that have one."""
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        # pyarrow itself would take an object that cannot be reached for one that is missing.
        source = stack.enter_context(open_file(path)) if files.in_bucket(path) else path
        opened = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
        yield stack.enter_context(opened)


@contextlib.contextmanager
def open_file(path: files.Path) -> Iterator[Any]:
    """An open file or object. Raises UserError where a bucket cannot be reached."""
    if not files.in_bucket(path):
        with open(path, "rb") as file:
            yield file
        return
    with buckets.reading(path), buckets.client(path).open(str(path)) as file:
        yield file


@contextlib.contextmanager
def damage(what: str) -> Iterator[None]:
    """Turn the errors of pyarrow into UserError. Those of the operating system are kept."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what is damaged
        if getattr(error, "errno", None) is not None:
            raise
        if isinstance(error, FileNotFoundError):  # of a bucket
            raise UserError(f"{what} cannot be read: there is no such object") from None
        # A size that is damaged may ask for any amount of memory.
        memory = "does not fit into memory or " * isinstance(error, MemoryError)
        raise UserError(
            f"{what} {memory}is damaged: {files.reason(error)}; fetch the shard again"
        ) from None


@dataclasses.dataclass(frozen=True)
class RowGroups(Sequence[bytes]):
    """The encoded image of each row of shards: fast in order, slow in random order.

    ends: the number of rows up to the end of each row group.
    """

    shards: list[Shard]
    ends: list[int]

    @classmethod
    def of(cls, shards: list[Shard]) -> "RowGroups":
        """The rows of shards in order."""
        return cls(shards, list(itertools.accumulate(n for shard in shards for n in shard.groups)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> bytes:
        number = bisect.bisect_right(self.ends, i)
        row = i - (self.ends[number - 1] if number else 0)
        for shard in self.shards:
            if number < len(shard.groups):
                return _read_recent(shard, number)[row].as_py() or b""
            number -= len(shard.groups)
        raise IndexError(i)


def unpack(shards: list[Shard]) -> Sequence[bytes]:
    """The encoded image of each row of shards, fast in any order; empty where a row has none.

    Copies the images of each shard to its `unpacked` file first, unless that exists. Several
    processes may call this at once, and divide the shards among them. Raises UserError where the
    shards are in a bucket, a file cannot be written, the images do not fit on the disk, or a shard
    is damaged.
    """
    if files.in_bucket(shards[0].path):
        folder = shards[0].path.parent
        raise UserError(
            f"{folder}: training reads images in random order, and parquet shards in a bucket can "
            f"only be read in order: copy them to a disk ({copy_command(folder)}), or train on "
            "latents of them, which mdt_jax.encode makes"
        )
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    missing = [shard for shard in shards if not _is_unpacked(shard)]
    if missing:
        _write_missing(missing)
    parts = [f"{shard.unpacked}[1:{1 + shard.rows}]" for shard in shards if shard.rows]
    return cast(Sequence[bytes], ArrayRecordDataSource(parts))


def _is_unpacked(shard: Shard) -> bool:
    from array_record.python.array_record_module import ArrayRecordReader

    if not os.path.isfile(shard.unpacked):
        return False
    try:
        reader = ArrayRecordReader(str(shard.unpacked))
        try:
            return (
                reader.num_records() == 1 + shard.rows and reader.read([0])[0] == shard.description
            )
        finally:
            reader.close()
    except Exception as error:  # of the kinds that ArrayRecord's C++ raises
        if files.passes(error):
            raise UserError(f"{shard.unpacked} cannot be read: {files.reason(error)}") from None
        return False


def _write_missing(missing: list[Shard]) -> None:
    """Write the `unpacked` files of shards, and wait for those that other processes write."""
    for folder in {shard.unpacked.parent for shard in missing}:
        check_path(folder, "the images of parquet shards")
        files.check_writable(
            folder,
            f"{folder}, to which training unpacks the images of parquet shards (a folder of "
            "symbolic links to the shards can be anywhere),",
        )
    size = sum(shard.images for shard in missing)
    files.check_room(missing[0].unpacked.parent, size)
    log(
        f"unpacking the images of {len(missing)} parquet shards once, so that they can be read in "
        f"random order: {size / 1e9:.3f} GB to {missing[0].path.parent} …"
    )
    waiting = False
    with progress_bar(sum(shard.rows for shard in missing), True, "unpacking", "image") as bar:
        while missing:
            if waiting:
                time.sleep(WAIT)
            remaining = []
            for shard in missing:
                if _write_unless_locked(shard):
                    bar.update(shard.rows)
                else:
                    remaining.append(shard)
            if remaining and not waiting:
                log(f"waiting for another process that unpacks {remaining[0].path} …")
            missing, waiting = remaining, bool(remaining)


def _write_unless_locked(shard: Shard) -> bool:
    """Write the `unpacked` file of a shard unless it exists.

    Returns False, and writes nothing, where another process is writing it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(locks.beside(shard.unpacked), str(shard.unpacked)))
        except UserError:  # the folder is known to be writable
            return False
        if not _is_unpacked(shard):
            for killed in shard.unpacked.parent.glob(f"{glob.escape(shard.unpacked.name)}.*.tmp"):
                killed.unlink(missing_ok=True)  # of a process that was killed
            _write(shard)
        return True


def _write(shard: Shard) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with files.atomic_write(shard.unpacked, (RuntimeError,)) as temporary:
        writer = ArrayRecordWriter(str(temporary), OPTIONS)
        writer.write(shard.description)
        for group in range(len(shard.groups)):
            for image in shard.read(group):
                writer.write(image.as_py() or b"")
        writer.close()
