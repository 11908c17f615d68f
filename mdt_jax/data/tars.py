"""Images inside a tar, read in place: ILSVRC2012's tar of a tar a class, or a plain one."""

import dataclasses
import io
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from mdt_jax.data.folders import STYLEGAN, class_of, class_order
from mdt_jax.data.found import LeftOut, describe, splits
from mdt_jax.data.pictures import SUFFIXES
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import save_arrays
from mdt_jax.runtime.progress import log

DEEPEST = 8  # tars within each other
LARGEST_HEADER = 2**20  # bytes; long names and attributes take a few hundred
# A tar ends in two blocks of zeros, and is then filled up to a record.
PADDING = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
CHECKED = 100  # images whose headers are compared with the index when it is taken up
# The index: arrays of strings and of int64, [images], [tars inside], or of any length.
INDEX = {
    "names": "U", "classes": "U", "headers": "i", "offsets": "i", "sizes": "i", "checks": "i",
    "tar_headers": "i", "tar_offsets": "i", "tar_checks": "i", "left_out": "U", "stamp": "i",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Members:
    """Images of a tar; where each lies in it. labels: [N] int32; classes: their names.

    headers, checks: where the headers of an image begin, and their CRC-32; offsets, sizes: of its
    content, which follows them. left_out: what else is in the tar, as of `LeftOut`.
    """

    path: pathlib.Path
    names: np.ndarray
    headers: np.ndarray
    checks: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: list[str]
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """For messages."""
        return f"{self.path}:{self.names[i]}"

    @property
    def found(self) -> str:
        """How many images of how many classes there are, and what is left out."""
        return describe(len(self), self.labels, self.classes, self.left_out)

    @property
    def contents(self) -> str:
        """What tells it from other sets: every name, length and label."""
        lists = self.names.tolist(), self.sizes.tolist(), self.labels.tolist()
        return "\n".join(map("{}\t{}\t{}".format, *lists))

    def read(self, i: int) -> tuple[io.BytesIO, int]:
        """(the file of an image, label). Raises OSError where the tar is another by now."""
        with open(self.path, "rb") as file:
            if _check(file, int(self.headers[i]), int(self.offsets[i])) != self.checks[i]:
                raise OSError(
                    f"{self.path} is another file than its index {_index(self.path)} is of: remove "
                    "the index and run again"
                )
            return io.BytesIO(file.read(int(self.sizes[i]))), int(self.labels[i])


def load(path: str) -> Members:
    """The images of a tar.

    The class is the nested tar or the folder that an image lies in, or of one that lies in neither
    the ClassID of ClassID_ImgID.jpg; where no image has any of these, there are no classes. Where
    everything lies is found once and kept in PATH.index.npz, as long as the tar is the same; an
    index that cannot be read is made anew. Raises UserError where it is no tar, is cut short, holds
    no images, has members that are stored sparsely or tars that lie more than DEEPEST deep, or
    where its folders are train and val (or test, …).
    """
    place = pathlib.Path(path)
    if not os.path.isfile(place):
        raise UserError(f"data.path {path} is no tar file")
    stamp = [os.stat(place).st_size, os.stat(place).st_mtime_ns]
    found = _kept(place, stamp)
    if found is None:
        found = _scan(place) | {"stamp": np.array(stamp)}
        try:
            save_arrays(_index(place), found)
        except UserError as error:  # a read-only data set is no reason to stop
            log(f"the index of {path} is not kept: {error}")
    divided = splits({os.path.dirname(os.path.normpath(name)) for name in found["names"].tolist()})
    if divided:
        folder, parts = divided
        raise UserError(
            f"{path}{':' * bool(folder)}{folder} is divided into {', '.join(parts)}, which are no "
            f"classes: make a tar of one of them, such as {parts[0]}"
        )
    names = set(found["classes"].tolist())
    classes = class_order(names) if names != {""} else []
    if "" in classes:
        bare = found["names"][found["classes"] == ""][0]
        raise UserError(f"{path}: {bare} lies in no folder or tar, but others do")
    numbers = {name: number for number, name in enumerate(classes or [""])}
    labels = np.array([numbers[name] for name in found["classes"].tolist()], np.int32)
    lie = {name: found[name] for name in ("names", "headers", "checks", "offsets", "sizes")}
    left_out = str(found["left_out"][0])
    return Members(place, labels=labels, classes=classes, left_out=left_out, **lie)


def _index(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.index.npz")


def _check(file: BinaryIO, header: int, offset: int) -> int:
    """CRC-32 of the headers from `header` on; the file is then at `offset`, the content."""
    file.seek(header)
    return zlib.crc32(file.read(offset - header))


def _kept(path: pathlib.Path, stamp: list[int]) -> dict[str, np.ndarray] | None:
    """The index, where there is one and the tar has the headers that it is of."""
    try:
        if not os.path.isfile(_index(path)):
            return None
        with np.load(_index(path)) as file:
            found = {name: file[name] for name in INDEX}
        return found if _is_of(found, path, stamp) else None
    except Exception:  # whatever is wrong with it, it is made anew
        return None


def _is_of(found: dict[str, np.ndarray], path: pathlib.Path, stamp: list[int]) -> bool:
    count, tars = len(found["names"]), len(found["tar_headers"])
    for name, kind in INDEX.items():
        length = {"left_out": 1, "stamp": 2}.get(name, tars if name.startswith("tar_") else count)
        if found[name].shape != (length,) or found[name].dtype.kind != kind:
            return False
        found[name].tolist()  # ValueError for what are no characters
    if not count or found["stamp"].tolist() != stamp:
        return False
    headers, offsets, checks = (
        np.concatenate([found[name], found[f"tar_{name}"]])
        for name in ("headers", "offsets", "checks")
    )
    sizes = np.concatenate([found["sizes"], np.zeros(tars, np.int64)])
    right = (headers >= 0) & (headers < offsets) & (offsets - headers < 4 * LARGEST_HEADER)
    if not (right & (sizes >= 0) & (sizes <= stamp[0] - offsets)).all():
        return False
    some = np.unique(np.linspace(0, count - 1, CHECKED).astype(int))
    with open(path, "rb") as file:
        return all(
            _check(file, int(headers[i]), int(offsets[i])) == checks[i]
            for i in (*some, *range(count, count + tars))
        )


def _scan(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All of the index but its stamp."""
    found = _Found([], [], LeftOut())
    with open(path, "rb") as file:
        _look_through(_Part(file, 0, os.stat(path).st_size), str(path), "", 1, found)
    left_out = str(found.left_out)
    if not found.images:
        more = f"; left out: {left_out}" if left_out else ""
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}), nor tars of them{more}")
    names, classes, headers, offsets, sizes, checks = zip(*found.images, strict=True)
    numbers = {"headers": headers, "offsets": offsets, "sizes": sizes, "checks": checks}
    inside = zip(*found.tars, strict=True) if found.tars else ((), (), ())
    numbers |= dict(zip(("tar_headers", "tar_offsets", "tar_checks"), inside, strict=True))
    return {
        "names": np.array(names),
        "classes": np.array(classes),
        "left_out": np.array([left_out]),
        **{name: np.array(column, np.int64) for name, column in numbers.items()},
    }


@dataclasses.dataclass(frozen=True)
class _Found:
    """What was found in a tar so far.

    images: name, class, header, offset, size, check of each; tars: header, offset, check of those
    inside.
    """

    images: list[tuple[str, str, int, int, int, int]]
    tars: list[tuple[int, int, int]]
    left_out: LeftOut


def _look_through(part: "_Part", place: str, above: str, depth: int, found: _Found) -> None:
    """Add to `found` what a tar holds, and the tars in it.

    above: the names of the tars that it lies in; depth: how many these are, itself included.
    """
    if depth > DEEPEST:
        raise UserError(f"{place}: tars lie more than {DEEPEST} deep in each other")
    try:
        with tarfile.open(fileobj=part, mode="r:") as archive:
            for member in _forward(archive):
                _add(member, part, place, above, depth, found)
            _check_end(part, place, archive.offset)
    except (UserError, OSError):
        raise
    except Exception as error:  # Python's reader raises many kinds, by what is damaged
        hint = "; it must not be compressed" if place.endswith(("gz", "bz2", "xz", "zst")) else ""
        raise UserError(f"{place} is no tar or is damaged: {error}{hint}") from None


def _forward(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its members; ReadError where one ends before it begins, which would be read for ever."""
    last = 0
    for member in archive:
        if member.size < 0 or archive.offset <= last:
            raise tarfile.ReadError(f"{member.name} ends before it begins")
        last = archive.offset
        yield member


def _add(
    member: tarfile.TarInfo, part: "_Part", place: str, above: str, depth: int, found: _Found
) -> None:
    """Add to `found` what a member of a tar is."""
    name = f"{above}{member.name}"
    is_tar = name.endswith(".tar")
    if member.isdir():
        return
    if any(step[0] == "." and step != ".." for step in os.path.normpath(name).split("/") if step):
        return found.left_out.add("hidden", name)
    if member.issym() or member.islnk():
        return found.left_out.add("link", name)
    if not member.isfile():
        return found.left_out.add("no regular file", name)
    part.seek(member.offset_data)
    if os.path.basename(name) == STYLEGAN and b'"labels"' in part.read(64):
        raise UserError(
            f"{place}: the labels in {member.name} are read from a folder only: extract the tar, "
            "and give the folder with data.name=folder"
        )
    if not is_tar and not name.lower().endswith(SUFFIXES):
        return found.left_out.add_unknown(name)
    if member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers):
        raise UserError(
            f"{place}: {member.name} is stored sparsely, which is not read: make the tar without "
            "--sparse"
        )
    part.seek(member.offset)
    check = zlib.crc32(part.read(member.offset_data - member.offset))
    header, offset = part.start + member.offset, part.start + member.offset_data
    if is_tar:
        found.tars.append((header, offset, check))
        inside = _Part(part.file, offset, member.size)
        return _look_through(inside, f"{place}:{member.name}", f"{name}/", depth + 1, found)
    holder = os.path.basename(os.path.dirname(os.path.normpath(name)))
    label = holder.removesuffix(".tar") or class_of(name) or ""
    found.images.append((name, label, header, offset, member.size, check))


def _check_end(part: "_Part", place: str, offset: int) -> None:
    """Raise UserError where what follows the last member is not the end of a tar.

    Python's reader takes what it cannot read for the end, and so the zeros where a download stopped
    in a file that had its full length from the start.
    """
    part.seek(offset)
    end, left = part.read(PADDING), part.size - offset
    if end[: tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE:
        raise UserError(f"{place} is damaged or cut short at byte {offset}")
    if left >= PADDING or end.strip(tarfile.NUL):
        raise UserError(
            f"{place} has zeros at byte {offset}, which end a tar, but {left} bytes are left: a "
            "download that stopped, or several tars joined; fetch or make it anew (if it is whole, "
            f"truncate --size={offset + 2 * tarfile.BLOCKSIZE} removes what is left)"
        )


class _Part(io.RawIOBase):
    """A stretch of a file, as a file, of which no more is read at once than a header takes."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        super().__init__()
        self.file, self.start, self.size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER or self._at < 0:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self._at}")
        if self._at >= self.size:
            return b""
        self.file.seek(self.start + self._at)
        content = self.file.read(min(size, self.size - self._at))
        self._at += len(content)
        return content
