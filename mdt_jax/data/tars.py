"""Images inside a tar, read in place: ILSVRC2012's tar of a tar a class, or a plain one."""

import dataclasses
import io
import os
import pathlib
import sys
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np

from mdt_jax.data.folders import SUFFIXES, class_of, class_order
from mdt_jax.errors import UserError
from mdt_jax.files import save_arrays


@dataclasses.dataclass(frozen=True)
class Members:
    """Images of a tar; where each lies in it. labels: [N] int32; classes: their names."""

    path: pathlib.Path
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """For messages."""
        return f"{self.path}:{self.names[i]}"

    @property
    def contents(self) -> str:
        """What tells it from other sets: every name, length and label."""
        lists = self.names.tolist(), self.sizes.tolist(), self.labels.tolist()
        return "\n".join(map("{}\t{}\t{}".format, *lists))

    def read(self, i: int) -> tuple[io.BytesIO, int]:
        """(the file of an image, label)."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return io.BytesIO(file.read(int(self.sizes[i]))), int(self.labels[i])


def load(path: str) -> Members:
    """The images of a tar.

    The class is the nested tar or the folder that an image lies in, or of one that lies in neither
    the ClassID of ClassID_ImgID.jpg; where no image has any of these, there are no classes. Where
    everything lies is found once and kept in PATH.index.npz, as long as the tar is the same.
    Raises UserError where it is no tar, is cut short, or holds no images.
    """
    place = pathlib.Path(path)
    if not os.path.isfile(place):
        raise UserError(f"data.path {path} is no tar file")
    index = place.with_name(f"{place.name}.index.npz")
    stamp = [os.stat(place).st_size, os.stat(place).st_mtime_ns]
    found = _kept(index, stamp)
    if found is None:
        found = _scan(place) | {"stamp": np.array(stamp)}
        try:
            save_arrays(index, found)
        except UserError as error:  # a read-only data set is no reason to stop
            print(f"the index of {path} is not kept: {error}", file=sys.stderr)
    names = set(found["classes"].tolist())
    classes = class_order(names) if names != {""} else []
    if "" in classes:
        bare = found["names"][found["classes"] == ""][0]
        raise UserError(f"{path}: {bare} lies in no folder or tar, but others do")
    numbers = {name: number for number, name in enumerate(classes or [""])}
    labels = np.array([numbers[name] for name in found["classes"].tolist()], np.int32)
    return Members(place, found["names"], found["offsets"], found["sizes"], labels, classes)


def _kept(index: pathlib.Path, stamp: list[int]) -> dict[str, np.ndarray] | None:
    try:
        with np.load(index) as file:
            found = {name: file[name] for name in ("names", "classes", "offsets", "sizes", "stamp")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found if found["stamp"].tolist() == stamp else None


def _scan(path: pathlib.Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        rows = list(_images(file, str(path), ""))
    if not rows:
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}), nor tars of them")
    names, classes, offsets, sizes = zip(*rows, strict=True)
    return {
        "names": np.array(names),
        "classes": np.array(classes),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
    }


def _images(file, place: str, above: str, start: int = 0) -> Iterator[tuple[str, str, int, int]]:
    """(name, class, offset, size) of the images of a tar and of the tars in it.

    above: the names of the tars that it lies in; start: where it lies in the outermost.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name, at = f"{above}{member.name}", start + member.offset_data
                hidden = os.path.basename(name).startswith(".")
                if member.isfile() and name.endswith(".tar") and not hidden:
                    with _Part(file, member.offset_data, member.size) as part:
                        yield from _images(part, f"{place}:{member.name}", f"{name}/", at)
                elif member.isfile() and name.lower().endswith(SUFFIXES) and not hidden:
                    holder = os.path.basename(os.path.dirname(os.path.normpath(name)))
                    yield name, holder.removesuffix(".tar") or class_of(name) or "", at, member.size
            # Python's reader takes what it cannot read for the end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise UserError(f"{place} is damaged or cut short at byte {archive.offset}")
    except (tarfile.TarError, EOFError) as error:
        hint = "; it must not be compressed" if place.endswith(("gz", "bz2", "xz", "zst")) else ""
        raise UserError(f"{place} is no tar or is damaged: {error}{hint}") from None


class _Part(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file, offset: int, size: int):
        super().__init__()
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content
