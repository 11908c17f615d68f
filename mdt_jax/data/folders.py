"""Images in folders: a folder a class, ClassID_ImgID names, lists of path and label."""

import csv
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from mdt_jax.data.found import LeftOut, describe, holder, splits
from mdt_jax.data.pictures import SUFFIXES
from mdt_jax.runtime.errors import UserError

LISTS = (".csv", ".jsonl")
HEADERS = ("path", "file", "filename", "file_name")  # of a CSV's first field
STYLEGAN = "dataset.json"  # where StyleGAN and EDM keep the labels of a folder
# What to do with files of other kinds.
HINTS = {
    (".tar",): "a tar is read with data.name=tar",
    (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"): "extract it first",
    (".npz", ".npy", ".pt", ".pth", ".pkl"): "evaluate reads images, or mu and sigma, of an npz",
}
DEEPEST = 32  # folders within each other


def class_order(names: set[str]) -> list[str]:
    """Sorted; as numbers where all are numbers, so that 10 comes after 2."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files below a folder. labels: [N] int32; classes: their names, none without labels.

    left_out: what else lies there, as of `LeftOut`.
    """

    root: pathlib.Path
    paths: list[str]
    labels: np.ndarray
    classes: list[str]
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """For messages."""
        return str(self.root / self.paths[i])

    @property
    def found(self) -> str:
        """How many images of how many classes there are, and what is left out."""
        return describe(len(self), self.labels, self.classes, self.left_out)

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
    images themselves, ClassID_ImgID.jpg gives the class, and names without "_" have none. A folder
    with the dataset.json of StyleGAN and EDM has the labels that this gives.
    A .csv of path,label (with or without that header) or a .jsonl of {"path": …, "label": …}: paths
    are taken from the file's folder, and labels may be names or numbers; without them there are no
    classes. num_classes: how many are expected; 0: they are left aside. Numbers in a list count
    from 0 to num_classes − 1, or from 1 to num_classes. Raises UserError where there is no image, a
    label is missing or out of range, a path leaves the folder, folders lie more than DEEPEST deep,
    or those of train and val (or test, …) would be taken for classes.
    """
    place, left_out = pathlib.Path(path), LeftOut()
    root, listed, pairs = _pairs(place, num_classes, left_out)
    if not pairs:
        more = f"; left out: {left_out}" if str(left_out) else ""
        raise UserError(f"data.path {path} holds no images ({', '.join(SUFFIXES)}){more}")
    paths = [image for image, _ in pairs]
    names = {label for _, label in pairs if label is not None} if num_classes != 0 else set()
    if not names:
        return Files(root, paths, np.zeros(len(pairs), np.int32), [], str(left_out))
    bare = [image for image, label in pairs if label is None]
    if bare:
        raise UserError(
            f"{path}: {bare[0]} has no label, but others have; model.num_classes=0 leaves labels "
            "aside"
        )
    classes = class_order(names)
    if listed and num_classes:
        classes = _numbered(listed, pairs, num_classes) or classes
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[label] for _, label in pairs if label is not None], np.int32)
    return Files(root, paths, labels, classes, str(left_out))


def _pairs(
    place: pathlib.Path, num_classes: int | None, left_out: LeftOut
) -> tuple[pathlib.Path, pathlib.Path | None, list[tuple[str, str | None]]]:
    """(the folder, the list that names its images, if one does, their paths and labels)."""
    is_folder = os.path.isdir(place)
    stylegan = place / STYLEGAN if is_folder and num_classes != 0 else place
    labels = None
    if stylegan.name == STYLEGAN and os.path.isfile(stylegan):
        labels = _stylegan_labels(stylegan)
    if labels:
        root, pairs = stylegan.parent, _listed(stylegan, _stylegan_lines(labels))
        _count_unlisted(root, {image for image, _ in pairs}, left_out)
        return root, stylegan, pairs
    if labels is not None:
        root = stylegan.parent
        return root, None, [(image, None) for image in _images(root, left_out)]
    if os.path.isfile(place) and place.suffix in LISTS:
        lines = _csv_lines(place) if place.suffix == ".csv" else _json_lines(place)
        return place.parent, place, _listed(place, lines)
    if is_folder:
        return place, None, _found(place, num_classes != 0, left_out)
    if not os.path.exists(place):
        raise UserError(f"data.path {place} does not exist")
    hint = next((f"; {hint}" for kinds, hint in HINTS.items() if place.suffix in kinds), "")
    raise UserError(f"data.path {place} is no folder, {' or '.join(LISTS)}{hint}")


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


def _found(root: pathlib.Path, labelled: bool, left_out: LeftOut) -> list[tuple[str, str | None]]:
    """(path below root, class) of every image, in an order that no file system changes."""
    paths = _images(root, left_out)
    inside = [path for path in paths if "/" in path]
    if inside and len(inside) < len(paths) and labelled:
        bare = next(path for path in paths if "/" not in path)
        raise UserError(f"{root} holds both folders of images and images without one, as {bare}")
    holding = {os.path.dirname(path) for path in paths}
    if found := splits(holding):
        folder, names = found
        raise UserError(
            f"{root / folder} is divided into {', '.join(names)}, which are no classes: give one "
            f"of them, such as {root / folder / names[0]}"
        )
    if labelled and (below := holder(holding)):
        raise UserError(
            f"{root} holds the folder {below.split('/')[0]} alone: where the folders in "
            f"{root / below} are the classes, give this path"
        )
    if inside:
        return [(path, path.split("/")[0]) for path in paths]
    return [(path, class_of(path)) for path in paths]


def _images(
    folder: str | os.PathLike, left_out: LeftOut, below: str = "", above: tuple[str, ...] = ()
) -> list[str]:
    """The paths of all images in a folder, then in those in it; links lead nowhere in circles."""
    real = os.path.realpath(folder)
    if real in above:
        left_out.add("link to a folder above", below.rstrip("/"))
        return []
    if len(above) > DEEPEST:
        raise UserError(f"{folder}: folders lie more than {DEEPEST} deep in each other")
    paths, inside = [], []
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name, link = f"{below}{entry.name}", entry.is_symlink()
        if entry.name[0] == ".":
            left_out.add("hidden", name)
        elif os.path.isdir(entry.path) if link else entry.is_dir():
            inside.append(entry)
        elif not (os.path.isfile(entry.path) if link else entry.is_file()):
            dangling = link and not os.path.exists(entry.path)
            left_out.add("broken link" if dangling else "no regular file", name)
        elif entry.name.lower().endswith(SUFFIXES):
            paths.append(name)
        elif not below and entry.name.endswith(LISTS):
            left_out.add("list, which is read where data.path names it", name)
        else:
            left_out.add_unknown(name)
    for entry in inside:
        there = _images(entry.path, left_out, f"{below}{entry.name}/", (*above, real))
        if not there and not below:
            left_out.add("folder without images", entry.name)
        paths += there
    return paths


def _count_unlisted(root: pathlib.Path, listed: set[str], left_out: LeftOut) -> None:
    """Note the images below a folder that its list does not name."""
    unlisted = [path for path in _images(root, LeftOut()) if path not in listed]
    if unlisted:
        left_out.add(f"image without a label in {STYLEGAN}", unlisted[0], len(unlisted))


def class_of(path: str) -> str | None:
    """The ClassID of ClassID_ImgID.jpg, if it is such a name."""
    head, underscore, _ = os.path.basename(path).partition("_")
    return head if underscore and head else None


def _listed(
    file: pathlib.Path, lines: Iterable[tuple[int, str, str | None]]
) -> list[tuple[str, str | None]]:
    """(path, label) of each line (its number, path, label) of a list, each checked."""
    labels: dict[str, str | None] = {}
    pairs = []
    try:
        for number, path, label in lines:
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
            if not row or (n == 0 and row[0].strip().lower() in HEADERS):
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


def _stylegan_labels(file: pathlib.Path) -> list | None:
    """The labels in a dataset.json, [path, number] each: none where StyleGAN had none.

    None where it is another program's file. Raises UserError where it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise UserError(f"{file} is no JSON: mend or remove it") from None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    labels = content["labels"]
    if labels is None:
        return []
    for entry in labels if isinstance(labels, list) else [labels]:
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, int]:
            raise UserError(f'{file}: "labels" is no list of [path, number], but has {entry!r:.80}')
    return labels


def _stylegan_lines(labels: list) -> Iterator[tuple[int, str, str | None]]:
    for number, (path, label) in enumerate(labels, start=1):
        yield number, path.replace("\\", "/"), str(label)
