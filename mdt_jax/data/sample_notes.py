"""What files of samples say of themselves: how they came about, their order, labels and classes."""

import dataclasses
import json
import pathlib
import re
import zipfile
from collections.abc import Sequence

import numpy as np

from mdt_jax.data.folders import FolderFiles
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular, passes, reason

SETTINGS = "settings.json"
MOST_NOTE = 1 << 24  # bytes of a note, generously


def written(note: dict) -> str:
    """A note as JSON, readable in any language.

    What is no character, as names of files may have, is an escape, so that the text can be UTF-8.
    """
    return json.dumps(note, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def note_of(path: pathlib.Path) -> str | None:
    """The note of an npz of samples; None where it is none, or is damaged.

    Raises UserError where the file cannot be read just now.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive, archive.open("note.npy") as file:
            shape, _, dtype = read_header(file)
            if shape or dtype.kind != "U" or not 0 < dtype.itemsize <= MOST_NOTE:
                return None
            note = str(np.frombuffer(file.read(dtype.itemsize), dtype)[0])
            return None if file.read(1) else note
    except Exception as error:  # of many kinds, by what is damaged
        check_readable(path, error)
        return None


def check_readable(path: pathlib.Path, error: Exception) -> None:
    """Raise UserError where what was raised in reading a file does not say that it is damaged."""
    if passes(error):
        raise UserError(f"{path} cannot be read just now: {reason(error)}") from None


def is_whole(path: pathlib.Path, shape: tuple[int, ...] | None = None) -> bool:
    """Whether an npz of samples is there with all its bytes as they were written.

    shape: of its images, where that is known. Raises UserError where it cannot be read just now.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            with archive.open("arr_0.npy") as file:
                found, _, _ = read_header(file)
            return shape in (None, found) and archive.testzip() is None
    except Exception as error:  # of many kinds, by what is damaged
        check_readable(path, error)
        return False


def read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of an npy, read past. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format is not known")
    return read(file)


def settings_of(folder: pathlib.Path) -> str | None:
    """The settings that a folder of samples is of, None where it has none; perhaps damaged."""
    try:
        check_regular(folder / SETTINGS)
        return (folder / SETTINGS).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def parsed(note: str | None) -> dict | None:
    """How samples came about, by name; None where it is no note of `mdt_jax.sample`."""
    try:
        found = json.loads(note or "null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "mdt_jax" in found else None


def in_order(files: FolderFiles) -> FolderFiles:
    """Samples that are all [LABEL_]NUMBER.png in the order in which they were drawn, as in an npz.

    By name they are in the order of their labels.
    """
    numbers = [re.fullmatch(r"(?:[0-9]+_)?([0-9]{6,})\.png", path) for path in files.paths]
    keys = [int(found[1]) for found in numbers if found]
    if len(keys) < len(files):
        return files
    order = np.argsort(keys, kind="stable")
    paths = [files.paths[n] for n in order]
    return dataclasses.replace(files, paths=paths, labels=files.labels[order])


def labels_in(
    paths: Sequence[str], labels: np.ndarray, classes: Sequence[str], note: dict | None, drawn: bool
) -> tuple[np.ndarray, Sequence[str]]:
    """(labels, names of the classes) of image files, read as a data set's are: those of samples.

    note: what lies beside them; drawn: whether they are samples in any case. In the file names of
    samples, LABEL_NUMBER.png, is the number of a class, which is a name in those of a data set.
    """
    flat = not any("/" in path for path in paths)
    numbers = flat and all(name.isascii() and name.isdigit() for name in classes)
    if not numbers or not (drawn or note):
        return labels, classes
    labels = np.array([int(name) for name in classes])[labels]
    return labels, classes_in(note, labels)


def classes_in(note: dict | None, labels: np.ndarray) -> list[str]:
    """The names of the classes in a note; none where it does not name the class of each label."""
    names = (note or {}).get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names if labels.min() >= 0 and labels.max() < len(names) else []
