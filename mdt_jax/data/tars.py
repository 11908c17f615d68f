"""Images in a tar, read in place: ILSVRC2012's tar of a tar for each class, or a plain tar."""

import contextlib
import dataclasses
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

import numpy as np

from mdt_jax.data import image_files
from mdt_jax.data.folders import STYLEGAN
from mdt_jax.data.image_files import ImageFiles, LeftOut
from mdt_jax.data.images import SUFFIXES
from mdt_jax.runtime import buckets, files
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import save_arrays
from mdt_jax.runtime.progress import log

MAX_DEPTH = 8  # levels of tars
MAX_HEADER = 2**20  # bytes; long names and attributes take a few hundred
# A tar ends in two blocks of zeros and is then filled up to a record.
PADDING = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
BLOCK = 2**25  # bytes of a tar in a bucket that a request asks for while the tar is read through
CHECKED = 100  # images whose headers are compared with an index that is read
# The arrays of an index: one element for each image, and one for each tar inside. Other arrays are
# "left_out", "stamp" (of `_stamp`) and "sha256" of all others.
IMAGE_COLUMNS = ("names", "classes", "headers", "offsets", "sizes", "checks")
TAR_COLUMNS = ("tar_headers", "tar_offsets", "tar_checks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarFiles(ImageFiles):
    """The images in a tar, and their positions in it.

    headers, checks: where the headers of each image begin, and the CRC-32 of these. offsets, sizes:
    where its content begins, right behind the headers, and the number of bytes.
    """

    path: files.Path
    names: np.ndarray
    headers: np.ndarray
    checks: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """The path of the tar, and of image i in it."""
        return f"{self.path}:{self.names[i]}"

    def read(self, i: int) -> tuple[io.BytesIO, int]:
        """(encoded content of image i, its label). Raises OSError where the tar was replaced."""
        return self._read_all([i])[0]

    def read_ahead(self, items: Sequence[int]) -> dict[int, tuple[BinaryIO, int]]:
        """`read` of several images at once, where each takes the time of a request to a bucket."""
        if not files.in_bucket(self.path):
            return {}
        return dict(zip(items, self._read_all(items), strict=True))

    def _read_all(self, items: Sequence[int]) -> list[tuple[io.BytesIO, int]]:
        starts, offsets = ([int(array[i]) for i in items] for array in (self.headers, self.offsets))
        ends = [offset + int(self.sizes[i]) for offset, i in zip(offsets, items, strict=True)]
        found = []
        for n, content in enumerate(_read_parts(self.path, starts, ends)):
            size = offsets[n] - starts[n]
            if zlib.crc32(content[:size]) != self.checks[items[n]]:
                raise OSError(
                    f"{self.path} is another file than its index {_index_path(self.path)} "
                    "describes: remove the index and run again"
                )
            found.append((io.BytesIO(content[size:]), int(self.labels[items[n]])))
        return found

    @property
    def sha256(self) -> str:
        """SHA-256 of the tar, hexadecimal; a tar in a bucket is read through, but not copied."""
        with _opened(self.path) as (file, _):
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def contents(self) -> str:
        """Every name, size and label."""
        columns = self.names.tolist(), self.sizes.tolist(), self.labels.tolist()
        return "\n".join(map("{}\t{}\t{}".format, *columns))


def load(path: str | os.PathLike) -> TarFiles:
    """List the images in a tar.

    The class of an image is the tar or the folder around it; without either, the ClassID of
    ClassID_ImgID.jpg; where no image has any of these, there are no classes. The positions of the
    images are kept in PATH.index.npz, and are found again where the tar changed or the index cannot
    be read. A tar in a bucket is read through for that; later an image is one request.

    Raises UserError where the file is no tar, is cut short, holds no images, has members stored
    sparsely or tars nested more than MAX_DEPTH deep, or where its folders are splits (train, val,
    …) instead of classes.
    """
    place = files.as_path(path)
    with buckets.reading(place):
        if not files.is_file(place):
            buckets.check_bucket(place)
            raise UserError(f"data.path {path} is no tar file")
        stamp = _stamp(place)
    index = _read_index(place, stamp)
    if index is None:
        index = {**_scan(place), "stamp": np.array(stamp)}
        index["sha256"] = np.array(_digest(index))
        try:
            save_arrays(_index_path(place), index)
        except UserError as error:  # a read-only data set can be used without
            log(f"the index of {path} is not kept: {error}")
    names, class_names = index["names"].tolist(), index["classes"].tolist()
    folders = {os.path.dirname(os.path.normpath(name)) for name in names}
    if splits := image_files.find_splits(folders):
        folder, parts = splits
        raise UserError(
            f"{path}{':' * bool(folder)}{folder} is divided into {', '.join(parts)}: these are "
            f"splits, not classes; make a tar of one of them, e.g. {parts[0]}"
        )
    classes = image_files.sort_classes(set(class_names)) if any(class_names) else []
    if "" in classes:
        bare = names[class_names.index("")]
        raise UserError(f"{path}: {bare} is in no folder or tar, but others are")
    return TarFiles(
        path=place, labels=image_files.number_labels(class_names, classes or [""]), classes=classes,
        left_out=str(index["left_out"][0]),
        **{name: index[name] for name in ("names", "headers", "checks", "offsets", "sizes")},
    )  # fmt: skip


def _index_path(path: files.Path) -> files.Path:
    return path.with_name(f"{path.name}.index.npz")


def _stamp(path: files.Path) -> list[int]:
    """A tar's size, and its time of modification or the CRC-32 of its object's version."""
    if not files.in_bucket(path):
        return [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    info = buckets.client(path).info(str(path))
    version = info.get("generation") or info.get("ETag")
    return [info["size"], zlib.crc32(str(version).encode())]


def _read_parts(path: files.Path, starts: list[int], ends: list[int]) -> list[bytes]:
    """The bytes of a tar from each start to its end. Raises OSError."""
    if not files.in_bucket(path):
        with open(path, "rb") as file:
            return [_read_part(file, *part) for part in zip(starts, ends, strict=True)]
    try:
        names = [str(path)] * len(starts)
        return buckets.client(path).cat_ranges(names, starts, ends, on_error="raise")
    except Exception as error:  # of many kinds, by client; not all can go to another process
        raise OSError(f"{path} cannot be read: {files.reason(error)}") from None


def _read_part(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


@contextlib.contextmanager
def _opened(path: files.Path) -> Iterator[tuple[Any, int]]:
    """(a tar to read through, its size)."""
    if not files.in_bucket(path):
        with open(path, "rb") as file:
            yield file, os.stat(path).st_size
        return
    client = buckets.client(path)
    with (
        buckets.reading(path),
        client.open(str(path), block_size=BLOCK, cache_type="readahead") as file,
    ):
        yield file, file.size


def _read_index(path: files.Path, stamp: list[int]) -> dict[str, np.ndarray] | None:
    """The index of a tar; None where there is none, it is damaged or is of another tar."""
    try:
        if not files.is_file(_index_path(path)):
            return None
        with np.load(files.fetched(_index_path(path))) as file:
            index = dict(file)
        sound = str(index["sha256"]) == _digest(index) and index["stamp"].tolist() == stamp
        return index if sound and _has_headers(path, index) else None
    except Exception:  # of many kinds; the index is made again
        return None


def _digest(index: dict[str, np.ndarray]) -> str:
    """SHA-256 of all arrays of an index except "sha256", hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(index.keys() - {"sha256"}):
        array = index[name]
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def _has_headers(path: files.Path, index: dict[str, np.ndarray]) -> bool:
    """Whether a tar has the headers in an index: those of some images and of all tars inside."""
    some = np.unique(np.linspace(0, len(index["names"]) - 1, CHECKED).astype(int))
    headers, offsets, checks = (
        [*index[name][some].tolist(), *index[f"tar_{name}"].tolist()]
        for name in ("headers", "offsets", "checks")
    )
    return checks == [*map(zlib.crc32, _read_parts(path, headers, offsets))]


def _scan(path: files.Path) -> dict[str, np.ndarray]:
    """Read a tar through: the arrays of its index, except the stamp."""
    if files.in_bucket(path):
        log(f"{path} is read through once for the positions of its images …")
    scan = _Scan()
    with _opened(path) as (file, size):
        scan.add_tar(_TarPart(file, 0, size, str(path)))
    left_out = str(scan.left_out)
    if not scan.columns["names"]:
        more = f"; left out: {left_out}" if left_out else ""
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}), nor tars of them{more}")
    index = {
        name: np.array(column, np.str_ if name in ("names", "classes") else np.int64)
        for name, column in scan.columns.items()
    }
    return {**index, "left_out": np.array([left_out])}


class _Scan:
    """What has been read of a tar, including the tars in it: the columns of the index."""

    def __init__(self):
        self.columns: dict[str, list] = {name: [] for name in (*IMAGE_COLUMNS, *TAR_COLUMNS)}
        self.left_out = LeftOut()

    def _add_row(self, columns: tuple[str, ...], row: tuple) -> None:
        for name, value in zip(columns, row, strict=True):
            self.columns[name].append(value)

    def add_tar(self, part: "_TarPart") -> None:
        """Add what a tar holds. Raises UserError as `load` does."""
        if part.depth > MAX_DEPTH:
            raise UserError(f"{part.title}: tars are nested more than {MAX_DEPTH} deep")
        try:
            with tarfile.open(fileobj=cast(BinaryIO, part), mode="r:") as archive:
                for member in _members(archive):
                    self._add_member(member, part)
                _check_end(part, archive.offset)
        except (UserError, OSError):
            raise
        except Exception as error:  # Python's reader raises many kinds, by what is damaged
            compressed = part.title.endswith(("gz", "bz2", "xz", "zst"))
            hint = "; it must not be compressed" if compressed else ""
            raise UserError(f"{part.title} is no tar or is damaged: {error}{hint}") from None

    def _add_member(self, member: tarfile.TarInfo, part: "_TarPart") -> None:
        name = f"{part.prefix}{member.name}"
        if member.isdir():
            return
        if kind := _left_out_kind(member, name):
            return self.left_out.add(kind, name)
        part.seek(member.offset_data)
        if os.path.basename(name) == STYLEGAN and b'"labels"' in part.read(64):
            raise UserError(
                f"{part.title}: the labels in {member.name} are read from a folder only: extract "
                "the tar, and give the folder with data.name=folder"
            )
        is_tar = name.endswith(".tar")
        if not is_tar and not name.lower().endswith(SUFFIXES):
            return self.left_out.add_unknown(name)
        if member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers):
            raise UserError(
                f"{part.title}: {member.name} is stored sparsely, which is not supported: make the "
                "tar without --sparse"
            )
        part.seek(member.offset)
        check = zlib.crc32(part.read(member.offset_data - member.offset))
        header, offset = part.start + member.offset, part.start + member.offset_data
        if is_tar:
            self._add_row(TAR_COLUMNS, (header, offset, check))
            return self.add_tar(part.inner(member, name))
        holder = os.path.basename(os.path.dirname(os.path.normpath(name)))
        class_name = holder.removesuffix(".tar") or image_files.class_in_name(name) or ""
        row = (name, class_name, header, offset, member.size, check)
        self._add_row(IMAGE_COLUMNS, row)


def _left_out_kind(member: tarfile.TarInfo, name: str) -> str | None:
    """Why a member is left out whatever its suffix; None where it may be an image or a tar."""
    steps = os.path.normpath(name).split("/")
    if any(step.startswith(".") and step != ".." for step in steps):
        return "hidden"
    if member.issym() or member.islnk():
        return "link"
    return None if member.isfile() else "no regular file"


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; ReadError where sizes lead backwards, which would never end."""
    last = 0
    for member in archive:
        if member.size < 0 or archive.offset <= last:
            raise tarfile.ReadError(f"{member.name} ends before it begins")
        last = archive.offset
        yield member


def _check_end(part: "_TarPart", offset: int) -> None:
    """Raise UserError where the bytes after the last member, at `offset`, do not end a tar.

    Python's reader takes anything that it cannot read for the end. So it takes the zeros of a
    download that stopped in a file of full length.
    """
    part.seek(offset)
    end, left = part.read(PADDING), part.size - offset
    if end[: tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE:
        raise UserError(f"{part.title} is damaged or cut short at byte {offset}")
    if left >= PADDING or end.strip(tarfile.NUL):
        raise UserError(
            f"{part.title} has zeros at byte {offset}, which end a tar, but {left} bytes are left: "
            "a download that stopped, or several tars joined; fetch or make it anew (if it is "
            f"complete, truncate --size={offset + 2 * tarfile.BLOCKSIZE} removes the rest)"
        )


@dataclasses.dataclass
class _TarPart:
    """A tar that is part of a file, with the methods of files that `tarfile` calls.

    title: the tar's name in messages. prefix: of the names of its members. depth: the number of
    tars around its members.
    """

    file: BinaryIO
    start: int
    size: int
    title: str
    prefix: str = ""
    depth: int = 1
    position: int = 0

    def inner(self, member: tarfile.TarInfo, name: str) -> "_TarPart":
        """A tar that is a member of this one; name: with the prefix."""
        start, title = self.start + member.offset_data, f"{self.title}:{member.name}"
        return _TarPart(self.file, start, member.size, title, f"{name}/", self.depth + 1)

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        self.position = position

    def read(self, size: int) -> bytes:
        """As of files, but never more than a header takes."""
        if not 0 <= size <= MAX_HEADER or self.position < 0:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.position}")
        if self.position >= self.size:
            return b""
        self.file.seek(self.start + self.position)
        content = self.file.read(min(size, self.size - self.position))
        self.position += len(content)
        return content
