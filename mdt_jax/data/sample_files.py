"""Files of samples, written batch by batch; an interrupted run resumes without drawing them again.

The settings of the samples are kept beside unfinished files, and a run with other settings does not
touch them.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mdt_jax.data import sample_notes
from mdt_jax.data.images import check_grid, open_image, save_grid, save_image
from mdt_jax.data.sample_notes import SETTINGS
from mdt_jax.runtime import files, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, atomic_write, check_regular, check_room, free, fsync, reason
from mdt_jax.runtime.progress import log

LOCK = ".lock"  # in a folder of samples
SHA256_BYTES = hashlib.sha256().digest_size
# Temporary files of `atomic_write` in a folder of samples, with the process that writes them.
TEMPORARY = re.compile(r"(?:settings\.json|\w+\.(?:npy|png))\.(\d+)-[0-9a-f]{8}\.tmp")


class Sink:
    """A destination of N samples, written batch by batch by the first process.

    Batches that an earlier run with the same settings wrote are kept.
    out: the file or folder; labels: [N]; shape: (H, W, C) of an image; note: how the samples are
    made. lock: the lock file that a writer must hold.
    """

    lock: Path

    def __init__(self, out: Path, labels: np.ndarray, shape: tuple, note: dict):
        self.out, self.labels, self.shape = out, np.asarray(labels, np.int64), shape
        self.note = sample_notes.written(note)

    def finished(self) -> bool:
        """Whether all samples are written and sound. May raise UserError for another file."""
        return False

    def begin(self) -> None:
        """Prepare `done` and `write`.

        Raises UserError where `out` has other settings, or the disk has no room.
        """
        raise NotImplementedError

    def done(self, start: int, count: int) -> bool:
        """Whether the images from number `start` to `start` + `count` are written and sound."""
        return False

    def write(self, start: int, images: np.ndarray) -> None:
        """Write [n, H, W, C] uint8, the images from number `start`. Raises UserError."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete `out` after all images are written. Raises UserError."""

    def give_up(self) -> None:
        """Remove what `begin` made if no image is written, because no more will be."""


class Npz(Sink):
    """OUT.npz, merged from a part for each batch in OUT.npz.parts."""

    def __init__(self, out: Path, labels: np.ndarray, shape: tuple, note: dict):
        super().__init__(out, labels, shape, note)
        self.folder = out.with_name(f"{out.name}.parts")
        self.lock = locks.beside(out)
        self._counts: dict[int, int] = {}  # number of the first image → images, of sound parts

    def finished(self) -> bool:
        if not files.exists(self.out):
            return False
        note = sample_notes.note_of(self.out)
        if note is None:
            raise UserError(f"{self.out} is no file of samples; remove it or choose another --out")
        if note != self.note:
            raise _other_settings(self.out, note, self.note)
        if not sample_notes.is_whole(self.out, (len(self.labels), *self.shape)):
            log(f"{self.out} is damaged; it is drawn again")
            return False
        if files.exists(self.folder):  # a run was stopped while removing it
            self._remove_parts()
        return True

    def give_way(self) -> None:
        """Remove files with other settings."""
        if files.exists(self.out) and sample_notes.note_of(self.out) != self.note:
            files.remove(self.out)
        if sample_notes.settings_of(self.folder) not in (None, self.note):
            files.remove_folder(self.folder)

    def begin(self) -> None:
        _begin_folder(self.folder, self.note)
        if isinstance(self.folder, pathlib.Path):
            size = len(self.labels) * int(np.prod(self.shape))
            written = sum(path.stat().st_size for path in self.folder.glob("*.npy"))
            check_room(self.out, 2 * size - written)

    def _parts(self) -> list[Path]:
        names = sorted(name for name in files.names_in(self.folder) if name.endswith(".npy"))
        return [self.folder / name for name in names]

    def _part(self, start: int) -> Path:
        return self.folder / f"{start:09d}.npy"

    def _read(self, start: int, count: int) -> np.ndarray | None:
        """Images [count, H, W, C] uint8 of a part; None where it is missing or damaged."""
        try:
            check_regular(self._part(start))
            content = self._part(start).read_bytes()
        except FileNotFoundError:
            return None
        npy, digest = content[:-SHA256_BYTES], content[-SHA256_BYTES:]
        if hashlib.sha256(npy).digest() != digest:
            return None
        images = np.load(io.BytesIO(npy))
        sound = images.shape == (count, *self.shape) and images.dtype == np.uint8
        return images if sound else None

    def done(self, start: int, count: int) -> bool:
        if self._read(start, count) is None:
            return False
        self._counts[start] = count
        return True

    def write(self, start: int, images: np.ndarray) -> None:
        """Write a part: an npy, and its SHA-256 behind."""
        npy = io.BytesIO()
        np.save(npy, images)
        digest = hashlib.sha256(npy.getvalue()).digest()
        with atomic_write(self._part(start)) as temporary:
            temporary.write_bytes(npy.getvalue() + digest)
        self._counts[start] = len(images)

    def finish(self) -> None:
        """Merge the parts to arr_0 uint8 [N, H, W, C], arr_1 int64 labels and note; remove them."""
        if files.in_bucket(self.out):
            with atomic_write(self.out) as temporary:
                self._merge(temporary)
            self._remove_parts()
            return
        merged = pathlib.Path(self.folder) / "merged"
        try:
            self._merge(merged)
            fsync(merged)
            os.replace(merged, self.out)
        except OSError as error:
            raise UserError(
                f"{self.out} could not be written: {reason(error)}{free(self.out)}; its parts are "
                f"kept in {self.folder}, and the same command resumes"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                merged.unlink()
        self._remove_parts()

    def _merge(self, path: pathlib.Path) -> None:
        """Write all samples to a local npz."""
        with zipfile.ZipFile(path, "w") as archive:
            with _open_entry(archive, "arr_0") as file:
                shape = (len(self.labels), *self.shape)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for images in self._images():
                    file.write(images.data)
            for name, array in (("arr_1", self.labels), ("note", np.array(self.note))):
                with _open_entry(archive, name) as file:
                    np.lib.format.write_array(file, array)

    def _images(self) -> Iterator[np.ndarray]:
        """The images of each part in order. Raises UserError where they do not make up all N."""
        total = 0
        for start, count in sorted(self._counts.items()):
            images = self._read(start, count)
            if images is None or start != total:
                raise UserError(
                    f"{self._part(start)} has changed since it was written; the same command draws "
                    "it again"
                )
            total += count
            yield images
        if total != len(self.labels):
            raise UserError(f"{self.folder} holds {total} of {len(self.labels)} samples")

    def give_up(self) -> None:
        if not self._parts():
            self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove the parts, and last the settings, by which the next run knows whose they are.

        Errors are ignored, because the samples are complete.
        """
        with contextlib.suppress(Exception):  # of many kinds in a bucket
            for part in self._parts():
                files.remove(part)
            files.remove_folder(self.folder)


def _open_entry(archive: zipfile.ZipFile, name: str):
    """An entry to write to, with a constant time, so that equal samples are equal bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


class Folder(Sink):
    """OUT/<label>_<number>.png, which data.name=folder reads with the labels."""

    def __init__(self, out: Path, labels: np.ndarray, shape: tuple, note: dict):
        super().__init__(out, labels, shape, note)
        self.lock = out / LOCK
        self.labelled = note["num_classes"] > 0
        self._objects: set[str] = set()  # of a bucket, where an object is whole or does not exist

    def _path(self, number: int) -> Path:
        label = f"{self.labels[number]}_" if self.labelled else ""
        return self.out / f"{label}{number:06d}.png"

    def finished(self) -> bool:
        if sample_notes.settings_of(self.out) != self.note:
            return False
        self._list_objects()
        numbers = range(len(self.labels))
        written = {*files.names_in(self.out)}.issuperset(self._path(n).name for n in numbers)
        return written and self.done(0, len(numbers))

    def begin(self) -> None:
        _begin_folder(self.out, self.note)
        self._list_objects()

    def _list_objects(self) -> None:
        if files.in_bucket(self.out):
            self._objects = {*files.names_in(self.out)}

    def done(self, start: int, count: int) -> bool:
        if files.in_bucket(self.out):
            numbers = range(start, start + count)
            return self._objects.issuperset(self._path(number).name for number in numbers)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return all(pool.map(self._is_sound, range(start, start + count)))

    def _is_sound(self, number: int) -> bool:
        """Whether a PNG can be decoded and has the right size."""
        try:
            with open_image(str(self._path(number))) as image:
                image.load()
                channels = {"L": 1, "RGB": 3}.get(image.mode)
                return (image.height, image.width, channels) == self.shape
        except Exception as error:  # of many kinds, by what is damaged
            sample_notes.check_readable(self._path(number), error)
            return False

    def write(self, start: int, images: np.ndarray) -> None:
        for number, image in enumerate(images, start):
            save_image(self._path(number), image)

    def give_up(self) -> None:
        if not any(name.endswith(".png") for name in files.names_in(self.out)):
            files.remove(self.out / SETTINGS)


class Grid(Sink):
    """OUT.png, a grid of all images, kept in memory until all are drawn."""

    def __init__(self, out: Path, labels: np.ndarray, shape: tuple, note: dict):
        super().__init__(out, labels, shape, note)
        self.lock = locks.beside(out)
        check_grid(out, len(labels), shape)
        self.images = np.zeros((len(labels), *shape), np.uint8)

    def begin(self) -> None:
        files.make_folder(self.out.parent)

    def write(self, start: int, images: np.ndarray) -> None:
        self.images[start : start + len(images)] = images

    def finish(self) -> None:
        save_grid(str(self.out), self.images, note=self.note)


def _begin_folder(folder: Path, note: str) -> None:
    """Make a folder with these settings, or check that it has them; remove a killed run's files."""
    files.make_folder(folder)
    paths = [folder / name for name in files.names_in(folder) if name != LOCK]
    abandoned = [path for path in paths if _is_abandoned(path)]
    before = sample_notes.settings_of(folder)
    if before is None:
        if len(paths) > len(abandoned):
            raise UserError(f"{folder} holds other files and no {SETTINGS}; choose another --out")
        with atomic_write(folder / SETTINGS) as temporary:
            temporary.write_text(note, encoding="utf-8")
    elif before != note:
        raise _other_settings(folder, before, note)
    for path in abandoned:
        with contextlib.suppress(OSError):
            files.remove(path)


def _is_abandoned(path: Path) -> bool:
    """Whether a file is temporary and its process is gone."""
    if path.name == "merged":
        return True
    name = TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    try:
        os.kill(int(name[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


def _other_settings(path: Path, old: str, new: str) -> UserError:
    """The error where samples have other settings; it names one that differs."""
    try:
        theirs, ours = json.loads(old), json.loads(new)
        name = next(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
        text = f"other settings ({name} is {theirs.get(name)} there and {ours.get(name)} here)"
    except (AttributeError, StopIteration, RecursionError, TypeError, ValueError):
        text = "unknown settings: its note of them is damaged"
    return UserError(f"{path} holds samples of {text}; remove it or choose another --out")
