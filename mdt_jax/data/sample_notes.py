"""The notes in files of samples: how they were made, their order, labels and classes."""

import dataclasses
import json
import re
import zipfile
from collections.abc import Sequence

import numpy as np

from mdt_jax.data.folders import FolderFiles
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, check_regular, fetched, passes, reason

SETTINGS = "settings.json"
MAX_NOTE = 1 << 24  # bytes; a note takes a few thousand


def written(note: dict) -> str:
    """A note as JSON, with text of any language as it is.

    Bytes of file names that are no characters become escapes, so that the text can be UTF-8.
    """
    return json.dumps(note, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def note_of(path: Path) -> str | None:
    """The note in an npz of samples; None where it is none, or is damaged.

    Raises UserError where the file cannot be read at the moment.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(fetched(path)) as archive, archive.open("note.npy") as file:
            shape, _, dtype = read_header(file)
            if shape or dtype.kind != "U" or not 0 < dtype.itemsize <= MAX_NOTE:
                return None
            note = str(np.frombuffer(file.read(dtype.itemsize), dtype)[0])
            return None if file.read(1) else note
    except Exception as error:  # of many kinds, by what is damaged
        check_readable(path, error)
        return None


def check_readable(path: Path, error: Exception) -> None:
    """Raise UserError where an error of reading a file does not mean that the file is damaged."""
    if passes(error):
        raise UserError(f"{path} cannot be read just now: {reason(error)}") from None


def is_whole(path: Path, shape: tuple[int, ...] | None = None) -> bool:
    """Whether the checksums of an npz of samples are right, and its images have this shape, if any.

    Raises UserError where the file cannot be read at the moment.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(fetched(path)) as archive, archive.open("arr_0.npy") as file:
            return shape in (None, read_header(file)[0]) and archive.testzip() is None
    except Exception as error:  # of many kinds, by what is damaged
        check_readable(path, error)
        return False


def read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an npy; the file is then at its data. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the npy format is not supported")


def settings_of(folder: Path) -> str | None:
    """The settings of a folder of samples, perhaps damaged; None where it has none."""
    try:
        check_regular(folder / SETTINGS)
        return (folder / SETTINGS).read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def parsed(note: str | None) -> dict | None:
    """The values of a note; None where it is no note of `mdt_jax.sample`."""
    try:
        values = json.loads(note or "null")
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and "mdt_jax" in values else None


def in_order(files: FolderFiles) -> FolderFiles:
    """Samples named [LABEL_]NUMBER.png in the order of NUMBER, in which they were drawn.

    A listing has them in the order of their names, by label. Other files are left in that order.
    """
    names = [re.fullmatch(r"(?:[0-9]+_)?([0-9]{6,})\.png", path) for path in files.paths]
    numbers = [int(name[1]) for name in names if name]
    if len(numbers) < len(files):
        return files
    order = np.argsort(numbers, kind="stable")
    paths = [files.paths[n] for n in order]
    return dataclasses.replace(files, paths=paths, labels=files.labels[order])


def labels_in(
    paths: Sequence[str], labels: np.ndarray, classes: Sequence[str], note: dict | None, drawn: bool
) -> tuple[np.ndarray, Sequence[str]]:
    """(labels, names of the classes) of image files, corrected where they are samples.

    In LABEL_NUMBER.png of samples, LABEL is the number of a class; in a data set it is its name.
    note: the note in their folder; drawn: whether they are samples even without a note.
    """
    flat = not any("/" in path for path in paths)
    numbered = flat and all(name.isascii() and name.isdigit() for name in classes)
    if not numbered or not (drawn or note):
        return labels, classes
    labels = np.array([int(name) for name in classes])[labels]
    return labels, classes_in(note, labels)


def classes_in(note: dict | None, labels: np.ndarray) -> list[str]:
    """The names of the classes in a note; empty where it does not name the class of each label."""
    names = (note or {}).get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names if labels.min() >= 0 and labels.max() < len(names) else []
