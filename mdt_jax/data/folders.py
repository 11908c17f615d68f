"""Images in folders: a folder a class, ClassID_ImgID names, a CSV or JSONL of path and label."""

import csv
import dataclasses
import json
import os
import pathlib
import re

import numpy as np

from mdt_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def class_order(names: set[str]) -> list[str]:
    """Sorted; as numbers where all are numbers, so that 10 comes after 2."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files below a folder. labels: [N] int32; classes: their names, none without labels."""

    root: pathlib.Path
    paths: list[str]
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """For messages."""
        return str(self.root / self.paths[i])

    @property
    def contents(self) -> str:
        """What tells it from other sets: every path and label."""
        return "\n".join(map("{}\t{}".format, self.paths, self.labels.tolist()))

    def read(self, i: int) -> tuple[pathlib.Path, int]:
        """(the file of an image, label)."""
        return self.root / self.paths[i], int(self.labels[i])


def load(path: str, num_classes: int | None = None) -> Files:
    """The images that `path` names.

    A folder: each folder in it is a class, of all images below that; where there are none but
    images themselves, ClassID_ImgID.jpg gives the class, and names without "_" have none.
    A .csv of path,label (with or without that header) or a .jsonl of {"path": …, "label": …}: paths
    are taken from the file's folder, and labels may be names or numbers; without them there are no
    classes. num_classes: how many are expected; 0: they are left aside. Numbers in a list count
    from 0 to num_classes − 1, or from 1 to num_classes. Raises UserError where there is no image, a
    label is missing or out of range, or a path leaves the folder.
    """
    place = pathlib.Path(path)
    if os.path.isfile(place) and place.suffix in (".csv", ".jsonl"):
        root, pairs = place.parent, _listed(place)
    elif os.path.isdir(place):
        root, pairs = place, _found(place, num_classes != 0)
    else:
        what = "is no folder, .csv or .jsonl" if os.path.exists(place) else "does not exist"
        raise UserError(f"data.path {path} {what}")
    if not pairs:
        raise UserError(f"data.path {path} holds no images ({', '.join(SUFFIXES)})")
    paths = [image for image, _ in pairs]
    names = {label for _, label in pairs if label is not None} if num_classes != 0 else set()
    if not names:
        return Files(root, paths, np.zeros(len(pairs), np.int32), [])
    bare = [image for image, label in pairs if label is None]
    if bare:
        raise UserError(f"{path}: {bare[0]} has no label, but others have")
    classes = class_order(names)
    if root != place and num_classes:
        classes = _numbered(place, pairs, num_classes) or classes
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[label] for _, label in pairs if label is not None], np.int32)
    return Files(root, paths, labels, classes)


def _numbered(
    file: pathlib.Path, pairs: list[tuple[str, str | None]], num_classes: int
) -> list[str] | None:
    """0, 1, … or 1, 2, … where the labels of a list are those numbers, some perhaps of no image.

    None where they are names. Raises UserError for a number that is out of range.
    """
    names = {label for _, label in pairs if label is not None}
    if not all(map(re.compile(r"-?(0|[1-9][0-9]*)").fullmatch, names)):
        return None
    for first in (0, 1):
        numbers = [str(number) for number in range(first, first + num_classes)]
        if names <= set(numbers):
            return numbers
    most, least = max(names, key=int), min(names, key=int)
    label = least if int(least) < 0 else most
    path = next(path for path, given in pairs if given == label)
    raise UserError(
        f"{file}: label {label} of {path} is out of range: {num_classes} classes are 0 to "
        f"{num_classes - 1}"
    )


def _found(root: pathlib.Path, labelled: bool) -> list[tuple[str, str | None]]:
    """(path below root, class) of every image, in an order that no file system changes."""
    paths = _images(root)
    inside = [path for path in paths if "/" in path]
    if inside and len(inside) < len(paths) and labelled:
        bare = next(path for path in paths if "/" not in path)
        raise UserError(f"{root} holds both folders of images and images without one, as {bare}")
    if inside:
        return [(path, path.split("/")[0]) for path in paths]
    return [(path, class_of(path)) for path in paths]


def _images(folder: str | os.PathLike, below: str = "", above: tuple[str, ...] = ()) -> list[str]:
    """The paths of all images in a folder, then in those in it; links lead nowhere in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if e.name[0] != "."), key=lambda entry: entry.name)
    inside = [entry for entry in entries if entry.is_dir()]
    paths = [
        f"{below}{entry.name}"
        for entry in entries
        if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir()
    ]
    for entry in inside:
        paths += _images(entry.path, f"{below}{entry.name}/", (*above, real))
    return paths


def class_of(path: str) -> str | None:
    """The ClassID of ClassID_ImgID.jpg, if it is such a name."""
    head, underscore, _ = os.path.basename(path).partition("_")
    return head if underscore and head else None


def _listed(file: pathlib.Path) -> list[tuple[str, str | None]]:
    """The lines of a CSV or JSONL, each checked."""
    read = _csv_lines if file.suffix == ".csv" else _json_lines
    labels: dict[str, str | None] = {}
    pairs = []
    try:
        for number, path, label in read(file):
            where = f"{file}, line {number}"
            if not path:
                raise UserError(f"{where}: no path")
            inside = os.path.normpath(path)
            if os.path.isabs(path) or inside.split(os.sep)[0] == "..":
                raise UserError(f"{where}: {path} leaves {file.parent}")
            if not os.path.isfile(file.parent / inside):
                raise UserError(f"{where}: {path} does not exist in {file.parent}")
            if (before := labels.setdefault(inside, label)) != label:
                raise UserError(f"{where}: {path} is {label}, but {before} in a line before")
            pairs.append((inside, label))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{file} is no CSV: {error}") from None
    return pairs


def _csv_lines(file: pathlib.Path):
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines)
        for n, row in enumerate(rows):
            if not row or (n == 0 and row[0].strip().lower() in ("path", "file", "filename")):
                continue
            number = rows.line_num
            if len(row) > 2:
                raise UserError(f"{file}, line {number}: {len(row)} fields; path,label are two")
            if len(row) == 2 and not row[1].strip():
                raise UserError(f"{file}, line {number}: the label is missing")
            yield number, row[0].strip(), row[1].strip() if len(row) == 2 else None


def _json_lines(file: pathlib.Path):
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                path, label = entry["path"], entry.get("label")
            except UnicodeDecodeError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{file}, line {number}: no {{"path": …, "label": …}}') from None
            known = (
                label is None or type(label) is int or (isinstance(label, str) and label.strip())
            )
            if not isinstance(path, str) or not known:
                raise UserError(f"{file}, line {number}: path is text, label text or a number")
            yield number, path, None if label is None else str(label).strip()
