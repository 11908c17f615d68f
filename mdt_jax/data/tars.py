"""Images inside a tar, read in place: ILSVRC2012's tar of a tar a class, or a plain one."""

import dataclasses
import io
import os
import pathlib
import sys
import tarfile
import zipfile

import numpy as np

from mdt_jax.data.folders import SUFFIXES, class_order
from mdt_jax.errors import UserError
from mdt_jax.files import whole


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

    def read(self, i: int):
        """(PIL.Image of whatever mode and size, label); OSError where it is no image."""
        from PIL import Image

        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            content = file.read(int(self.sizes[i]))
        return Image.open(io.BytesIO(content)), int(self.labels[i])


def load(path: str) -> Members:
    """The images of a tar; a nested tar, or the folder within, is the class.

    Where everything lies is found once and kept in PATH.index.npz, as long as the tar is the same.
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
            with whole(index) as temporary, open(temporary, "wb") as file:
                np.savez(file, **found)
        except UserError as error:  # a read-only data set is no reason to stop
            print(f"the index of {path} is not kept: {error}", file=sys.stderr)
    classes = class_order(set(found["classes"].tolist()))
    numbers = {name: number for number, name in enumerate(classes)}
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
    rows = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
            for member in outer:
                if member.isfile() and member.name.endswith(".tar"):
                    part = _Part(path, member.offset_data, member.size)
                    class_name = os.path.basename(member.name).removesuffix(".tar")
                    with part, tarfile.open(fileobj=part, mode="r:") as inner:
                        rows += [
                            (f"{member.name}/{m.name}", class_name, at + member.offset_data, size)
                            for m, at, size in _images(inner)
                        ]
                elif row := _image(member):
                    m, at, size = row
                    rows.append((m.name, os.path.basename(os.path.dirname(m.name)), at, size))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is no tar or is damaged: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    end = rows[-1][2] + rows[-1][3]
    if end > os.stat(path).st_size:
        raise UserError(f"{path} is cut short: {rows[-1][0]} ends at byte {end}")
    names, classes, offsets, sizes = zip(*rows, strict=True)
    return {
        "names": np.array(names),
        "classes": np.array(classes),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
    }


def _image(member: tarfile.TarInfo):
    if member.isfile() and member.name.lower().endswith(SUFFIXES):
        return member, member.offset_data, member.size
    return None


def _images(archive: tarfile.TarFile):
    return filter(None, map(_image, archive))


class _Part(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, path: pathlib.Path, offset: int, size: int):
        self._file = open(path, "rb")  # noqa: SIM115, closed in `close`
        self._offset, self._size, self._at = offset, size, 0

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

    def close(self) -> None:
        self._file.close()
        super().close()
