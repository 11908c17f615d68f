"""Samples on disk as they come, batch by batch: what is written is not drawn again.

What a file is of is kept beside it while it grows, and a run of other settings does not touch it.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from mdt_jax.data.images import check_grid, open_image, save_grid, save_image
from mdt_jax.data.sample_notes import (
    SETTINGS,
    check_readable,
    is_whole,
    note_of,
    settings_of,
    written,
)
from mdt_jax.runtime import locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, check_regular, check_room, free, fsync, reason
from mdt_jax.runtime.progress import log

LOCK = ".lock"  # in a folder of samples
SUM_BYTES = hashlib.sha256().digest_size


class Sink(Protocol):
    """Where N samples go, batch by batch; used by the first process alone.

    What a run before has written is kept, if it was of the same settings.
    """

    @property
    def out(self) -> pathlib.Path:
        """What is written."""
        ...

    @property
    def lock(self) -> pathlib.Path:
        """The lock file that whoever writes there holds."""
        ...

    def finished(self) -> bool:
        """Whether all N are there already, and can be read. May raise UserError where something
        else is.
        """
        ...

    def begin(self) -> None:
        """Make ready for `done` and `write`, or go on with what is there.

        Raises UserError where it is of other settings, or the disk has no room.
        """
        ...

    def done(self, start: int, count: int) -> bool:
        """Whether all of the `count` images from number `start` on are written, and are whole."""
        ...

    def write(self, start: int, images: np.ndarray) -> None:
        """images: [n, H, W, C] uint8, those from number `start` on. Raises UserError."""
        ...

    def finish(self) -> None:
        """To be called when all N are written. Raises UserError where the file cannot be."""
        ...

    def give_up(self) -> None:
        """To be called where no more samples come: remove what `begin` made, if nothing is in."""
        ...


class Npz:
    """OUT.npz, made from a shard for each batch in OUT.npz.parts."""

    def __init__(self, out: pathlib.Path, labels: np.ndarray, shape: tuple, note: dict):
        """labels: [N]; shape: (H, W, C) of an image; note: how they come about."""
        self.out, self.labels, self.shape = out, np.asarray(labels, np.int64), shape
        self.note = written(note)
        self.folder = out.with_name(f"{out.name}.parts")
        self.lock = locks.beside(out)
        self._counts: dict[int, int] = {}  # images of each part that is there, by its first one

    def finished(self) -> bool:
        if not self.out.exists():
            return False
        there = note_of(self.out)
        if there != self.note:
            what = "is no file of samples" if there is None else _other(there, self.note)
            raise UserError(f"{self.out} {what}; remove it or choose another --out")
        if not is_whole(self.out, (len(self.labels), *self.shape)):
            log(f"{self.out} is damaged; it is drawn anew")
            return False
        if self.folder.exists():  # stopped while it was removed
            self._remove_parts()
        return True

    def give_way(self) -> None:
        """Remove what is there of other settings."""
        if self.out.exists() and note_of(self.out) != self.note:
            self.out.unlink()
        if settings_of(self.folder) not in (None, self.note):
            shutil.rmtree(self.folder)

    def begin(self) -> None:
        _settle_in(self.folder, self.note)
        size = len(self.labels) * int(np.prod(self.shape))
        check_room(self.out, 2 * size - sum(path.stat().st_size for path in self._parts()))

    def _parts(self) -> list[pathlib.Path]:
        return sorted(self.folder.glob("*.npy"))

    def _part(self, start: int) -> pathlib.Path:
        return self.folder / f"{start:09d}.npy"

    def _read(self, start: int, count: int) -> np.ndarray | None:
        """[count, H, W, C] uint8, of a part; None where it is not there, or is damaged."""
        try:
            check_regular(self._part(start))
            content = self._part(start).read_bytes()
        except FileNotFoundError:
            return None
        saved, digest = content[:-SUM_BYTES], content[-SUM_BYTES:]
        if hashlib.sha256(saved).digest() != digest:
            return None
        part = np.load(io.BytesIO(saved))
        there = part.shape == (count, *self.shape) and part.dtype == np.uint8
        return part if there else None

    def done(self, start: int, count: int) -> bool:
        if self._read(start, count) is None:
            return False
        self._counts[start] = count
        return True

    def write(self, start: int, images: np.ndarray) -> None:
        """An npy, and after it its SHA-256."""
        saved = io.BytesIO()
        np.save(saved, images)
        with atomic_write(self._part(start)) as temporary, open(temporary, "wb") as file:
            file.write(saved.getvalue())
            file.write(hashlib.sha256(saved.getvalue()).digest())
        self._counts[start] = len(images)

    def finish(self) -> None:
        """Merge the parts: arr_0 uint8 [N, H, W, C], arr_1 int64 labels, note; then remove them."""
        merged = self.folder / "merged"
        try:
            with zipfile.ZipFile(merged, "w") as archive:
                with _entry(archive, "arr_0") as file:
                    shape = (len(self.labels), *self.shape)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in self._images():
                        file.write(part.data)
                for name, array in (("arr_1", self.labels), ("note", np.array(self.note))):
                    saved = io.BytesIO()
                    np.save(saved, array)
                    with _entry(archive, name) as file:
                        file.write(saved.getvalue())
            fsync(merged)
            os.replace(merged, self.out)
            self._remove_parts()
        except UserError:
            with contextlib.suppress(OSError):
                merged.unlink()
            raise
        except OSError as error:
            with contextlib.suppress(OSError):
                merged.unlink()
            raise UserError(
                f"{self.out} could not be written: {reason(error)}{free(self.out)}; its parts are "
                f"kept in {self.folder}, and the same command goes on"
            ) from None

    def _images(self) -> Iterator[np.ndarray]:
        """Those of each part, in order. Raises UserError where they are not those of all labels."""
        total = 0
        for start, count in sorted(self._counts.items()):
            part = self._read(start, count)
            if part is None or start != total:
                raise UserError(
                    f"{self._part(start)} has changed since it was written; the same command draws "
                    "it anew"
                )
            total += count
            yield part
        if total != len(self.labels):
            raise UserError(f"{self.folder} holds {total} of {len(self.labels)} samples")

    def give_up(self) -> None:
        if not self._parts():
            self._remove_parts()

    def _remove_parts(self) -> None:
        """The settings last: while they are there, it is known whose parts these are.

        What cannot be removed stays: the file itself is whole by now.
        """
        with contextlib.suppress(OSError):
            for part in self._parts():
                part.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


def _entry(archive: zipfile.ZipFile, name: str):
    """An entry to write to; its time is always the same, so that equal samples are equal bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


class Folder:
    """OUT/<label>_<number>.png, which a data set of folders reads with its labels."""

    def __init__(self, out: pathlib.Path, labels: np.ndarray, shape: tuple, note: dict):
        self.out, self.labels, self.shape = out, labels, shape
        self.lock = out / LOCK
        self.note = written(note)
        self.labelled = note["num_classes"] > 0

    def _path(self, number: int) -> pathlib.Path:
        label = f"{self.labels[number]}_" if self.labelled else ""
        return self.out / f"{label}{number:06d}.png"

    def finished(self) -> bool:
        numbers = range(len(self.labels))
        return (
            settings_of(self.out) == self.note
            and all(self._path(number).exists() for number in numbers)
            and self.done(0, len(numbers))
        )

    def begin(self) -> None:
        _settle_in(self.out, self.note)

    def done(self, start: int, count: int) -> bool:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return all(pool.map(self._is_there, range(start, start + count)))

    def _is_there(self, number: int) -> bool:
        """Whether a PNG can be read to its end, and is of the right size."""
        try:
            with open_image(self._path(number)) as image:
                image.load()
                bands = 1 if image.mode == "L" else 3 if image.mode == "RGB" else 0
                return (image.height, image.width, bands) == self.shape
        except Exception as error:  # of many kinds, by what is damaged
            check_readable(self._path(number), error)
            return False

    def write(self, start: int, images: np.ndarray) -> None:
        for number, image in enumerate(images, start):
            save_image(self._path(number), image)

    def finish(self) -> None:
        """All of them are in place."""

    def give_up(self) -> None:
        if not any(self.out.glob("*.png")):
            (self.out / SETTINGS).unlink(missing_ok=True)


class Grid:
    """OUT.png, one picture of all, enlarged where they are small."""

    def __init__(self, out: pathlib.Path, labels: np.ndarray, shape: tuple, note: dict):
        self.out, self.note = out, written(note)
        self.lock = locks.beside(out)
        check_grid(out, len(labels), shape)
        self.images = np.zeros((len(labels), *shape), np.uint8)

    def finished(self) -> bool:
        return False

    def begin(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def done(self, start: int, count: int) -> bool:
        return False

    def write(self, start: int, images: np.ndarray) -> None:
        self.images[start : start + len(images)] = images

    def give_up(self) -> None:
        """Nothing was made."""

    def finish(self) -> None:
        save_grid(str(self.out), self.images, note=self.note)


def _settle_in(folder: pathlib.Path, note: str) -> None:
    """Make a folder of samples with these settings, or find that it is one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [path for path in folder.iterdir() if path.name != LOCK]
    left = [path for path in found if _was_left(path)]
    there = settings_of(folder)
    if there is None:
        if len(found) > len(left):
            raise UserError(f"{folder} holds other files and no {SETTINGS}; choose another --out")
        with atomic_write(folder / SETTINGS) as temporary:
            temporary.write_text(note, encoding="utf-8")
    elif there != note:
        raise UserError(f"{folder} {_other(there, note)}; remove it or choose another --out")
    for path in left:
        with contextlib.suppress(OSError):
            path.unlink()


def _was_left(path: pathlib.Path) -> bool:
    """Whether this is what a run that was killed here was writing."""
    ours = r"(?:settings\.json|\w+\.(?:npy|png))\.(\d+)-[0-9a-f]{8}\.tmp"
    name = re.fullmatch(ours, path.name)
    return path.name == "merged" or (name is not None and not _runs(int(name[1])))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _other(there: str, here: str) -> str:
    """That it holds samples of other settings, and one that differs."""
    try:
        theirs, ours = json.loads(there), json.loads(here)
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        what = f"{names[0]} is {theirs.get(names[0])} there and {ours.get(names[0])} here"
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return "holds samples of unknown settings: its note of them is damaged"
    return f"holds samples of other settings ({what})"
