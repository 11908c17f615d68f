"""Image files in a folder: a folder for each class, ClassID_ImgID names, or a list with labels."""

import csv
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mdt_jax.data import image_files
from mdt_jax.data.image_files import ImageFiles, LeftOut
from mdt_jax.data.images import SUFFIXES
from mdt_jax.data.in_buckets import copy_command
from mdt_jax.runtime import buckets
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import exists, in_bucket

LISTS = (".csv", ".jsonl")
HEADERS = ("path", "file", "filename", "file_name")  # of a CSV's first column
STYLEGAN = "dataset.json"  # StyleGAN's and EDM's file of labels in a folder
# How to read other kinds of files.
HINTS = {
    (".tar",): "a tar is read with data.name=tar",
    (".parquet",): "parquet shards are read with data.name=parquet",
    (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"): "extract it first",
    (".npz", ".npy", ".pt", ".pth", ".pkl"): "evaluate reads images, or mu and sigma, of an npz",
}
MAX_DEPTH = 32  # levels of folders


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderFiles(ImageFiles):
    """Image files below a folder, `root`; paths: relative to it."""

    root: pathlib.Path
    paths: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """The path of image i."""
        return str(self.root / self.paths[i])

    def read(self, i: int) -> tuple[pathlib.Path, int]:
        """(path of image i, its label)."""
        return self.root / self.paths[i], int(self.labels[i])

    @property
    def contents(self) -> str:
        """Every path and label."""
        return "\n".join(map("{}\t{}".format, self.paths, self.labels.tolist()))


class _Listing(NamedTuple):
    """Paths below `root` in order, the class of each, and the list file that names them, if any."""

    root: pathlib.Path
    paths: list[str]
    names: list[str | None]
    file: pathlib.Path | None = None


class _Line(NamedTuple):
    """A line of a list file."""

    number: int
    path: str
    label: str | None


def load(path: str | os.PathLike, num_classes: int | None = None) -> FolderFiles:
    """List the images of a folder or a list file.

    A folder: each folder in it is a class, with all images below; a folder of images alone takes
    the classes from names ClassID_ImgID.jpg, and names without "_" have no class. The dataset.json
    of StyleGAN and EDM gives the labels of its folder.
    A .csv of path,label (with or without that header) or a .jsonl of {"path": …, "label": …}: paths
    are relative to the file's folder; labels are names or numbers; without labels there are no
    classes.
    num_classes: the expected number; 0 ignores labels. Numbers in a list count from 0 to
    num_classes − 1, or from 1 to num_classes. Raises UserError where there is no image, a label is
    missing or out of range, a path leaves the folder, folders are nested more than MAX_DEPTH deep,
    or the folders are splits (train, val, …) instead of classes.
    """
    if in_bucket(path):
        with buckets.reading(path):
            found = exists(path)
        if not found:
            buckets.check_bucket(path)
            raise UserError(f"data.path {path} does not exist")
        raise UserError(
            f"{path}: a folder of images is read from disks, not from buckets; copy it "
            f"({copy_command(path)}), make a tar of it, or encode it to latents once"
        )
    left_out = LeftOut()
    listing = _list(pathlib.Path(path), num_classes != 0, left_out)
    if not listing.paths:
        more = f"; left out: {left_out}" if str(left_out) else ""
        raise UserError(f"data.path {path} holds no images ({', '.join(SUFFIXES)}){more}")
    names = [name for name in listing.names if name is not None] if num_classes != 0 else []
    classes, labels = [], np.zeros(len(listing.paths), np.int32)
    if names:
        if None in listing.names:
            bare = listing.paths[listing.names.index(None)]
            raise UserError(
                f"{path}: {bare} has no label, but others have; model.num_classes=0 ignores labels"
            )
        classes = image_files.sort_classes(set(names))
        if listing.file is not None and num_classes:
            classes = _numbered_classes(listing, num_classes) or classes
        labels = image_files.number_labels(names, classes)
    return FolderFiles(
        root=listing.root, paths=listing.paths, labels=labels, classes=classes,
        left_out=str(left_out),
    )  # fmt: skip


def _list(place: pathlib.Path, labelled: bool, left_out: LeftOut) -> _Listing:
    """List a folder or a file by its kind."""
    is_folder = os.path.isdir(place)
    stylegan = place / STYLEGAN if is_folder and labelled else place
    if stylegan.name == STYLEGAN and os.path.isfile(stylegan):
        labels = _stylegan_labels(stylegan)
        if labels is not None:
            return _list_stylegan(stylegan, labels, left_out)
    if is_folder:
        return _list_folder(place, labelled, left_out)
    if os.path.isfile(place) and place.suffix in LISTS:
        lines = _csv_lines(place) if place.suffix == ".csv" else _json_lines(place)
        return _list_lines(place, lines)
    if not os.path.exists(place):
        raise UserError(f"data.path {place} does not exist")
    hint = next((f"; {hint}" for kinds, hint in HINTS.items() if place.suffix in kinds), "")
    raise UserError(f"data.path {place} must be a folder, {' or '.join(LISTS)}{hint}")


def _numbered_classes(listing: _Listing, num_classes: int) -> list[str] | None:
    """0, 1, … or 1, 2, … where the labels of a list are such numbers; some may have no image.

    None where the labels are names. Raises UserError for a number out of range.
    """
    names = {name for name in listing.names if name is not None}
    if not all(re.fullmatch(r"-?(0|[1-9][0-9]*)", name) for name in names):
        return None
    for first in (0, 1):
        numbers = [str(number) for number in range(first, first + num_classes)]
        if names <= set(numbers):
            return numbers
    most, least = max(names, key=int), min(names, key=int)
    label = least if int(least) < 0 else most
    raise UserError(
        f"{listing.file}: label {label} of {listing.paths[listing.names.index(label)]} is out of "
        f"range: {num_classes} classes are 0 to {num_classes - 1}"
    )


def _list_folder(root: pathlib.Path, labelled: bool, left_out: LeftOut) -> _Listing:
    """List every image below a folder, in an order that no file system changes."""
    paths = _walk(root, left_out)
    nested = [path for path in paths if "/" in path]
    if nested and len(nested) < len(paths) and labelled:
        bare = next(path for path in paths if "/" not in path)
        raise UserError(f"{root} holds both folders of images and images without one, e.g. {bare}")
    folders = {os.path.dirname(path) for path in paths}
    if splits := image_files.find_splits(folders):
        folder, names = splits
        raise UserError(
            f"{root / folder} is divided into {', '.join(names)}: these are splits, not classes; "
            f"give one of them, e.g. {root / folder / names[0]}"
        )
    if labelled and (inner := _common_folder(folders)):
        raise UserError(
            f"{root} holds only the folder {inner.split('/')[0]}: if the folders in "
            f"{root / inner} are the classes, give this path"
        )
    if nested:
        return _Listing(root, paths, [path.split("/")[0] for path in paths])
    return _Listing(root, paths, [image_files.class_in_name(path) for path in paths])


def _common_folder(folders: set[str]) -> str:
    """The innermost folder that holds all of several folders; "" where there is none."""
    if len(folders) < 2 or "" in folders:
        return ""
    common = os.path.commonpath(folders)
    return common if common not in folders else ""


def _walk(
    folder: str | os.PathLike, left_out: LeftOut, prefix: str = "", above: tuple[str, ...] = ()
) -> list[str]:
    """The paths of all images in a folder, then in its folders; links never lead into a circle.

    prefix: of the paths; above: the real paths of the folders around this one.
    """
    real = os.path.realpath(folder)
    if real in above:
        left_out.add("link to a folder above", prefix.rstrip("/"))
        return []
    if len(above) > MAX_DEPTH:
        raise UserError(f"{folder}: folders are nested more than {MAX_DEPTH} deep")
    paths, folders = [], []
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name, link = f"{prefix}{entry.name}", entry.is_symlink()
        if entry.name[0] == ".":
            left_out.add("hidden", name)
        elif os.path.isdir(entry.path) if link else entry.is_dir():
            folders.append(entry)
        elif not (os.path.isfile(entry.path) if link else entry.is_file()):
            broken = link and not os.path.exists(entry.path)
            left_out.add("broken link" if broken else "no regular file", name)
        elif entry.name.lower().endswith(SUFFIXES):
            paths.append(name)
        elif not prefix and entry.name.endswith(LISTS):
            left_out.add("list, which is read where data.path names it", name)
        else:
            left_out.add_unknown(name)
    for entry in folders:
        nested = _walk(entry.path, left_out, f"{prefix}{entry.name}/", (*above, real))
        if not nested and not prefix:
            left_out.add("folder without images", entry.name)
        paths += nested
    return paths


def _list_lines(file: pathlib.Path, lines: Iterable[_Line]) -> _Listing:
    """List the images that the lines of a list file name, each line checked."""
    labels: dict[str, str | None] = {}
    paths = []
    try:
        for number, path, label in lines:
            position = f"{file}, line {number}"
            if not path:
                raise UserError(f"{position}: no path")
            inside = os.path.normpath(path)
            if os.path.isabs(path) or inside.split(os.sep)[0] == "..":
                raise UserError(f"{position}: {path} leaves {file.parent}")
            if not os.path.isfile(file.parent / inside):
                raise UserError(f"{position}: {path} does not exist in {file.parent}")
            if (before := labels.setdefault(inside, label)) != label:
                raise UserError(f"{position}: {path} is {label}, but {before} in an earlier line")
            paths.append(inside)
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{file} is no CSV: {error}") from None
    return _Listing(file.parent, paths, [labels[path] for path in paths], file)


def _csv_lines(file: pathlib.Path) -> Iterator[_Line]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines)
        for n, row in enumerate(rows):
            if not row or (n == 0 and row[0].strip().lower() in HEADERS):
                continue
            position = f"{file}, line {rows.line_num}"
            if len(row) > 2:
                raise UserError(f"{position}: expected path,label; got {len(row)} fields")
            if len(row) == 2 and not row[1].strip():
                raise UserError(f"{position}: the label is missing")
            yield _Line(rows.line_num, row[0].strip(), row[1].strip() if len(row) == 2 else None)


def _json_lines(file: pathlib.Path) -> Iterator[_Line]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            position = f"{file}, line {number}"
            try:
                entry = json.loads(line)
                path, label = entry["path"], entry.get("label")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{position}: expected {{"path": …, "label": …}}') from None
            is_label = label is None or type(label) is int or isinstance(label, str)
            label = None if label is None else str(label).strip()
            if not isinstance(path, str) or not is_label or label == "":
                raise UserError(f"{position}: path must be text, and label text or a whole number")
            yield _Line(number, path, label)


def _stylegan_labels(file: pathlib.Path) -> list | None:
    """The labels in a dataset.json, [path, number] each; empty where StyleGAN had none.

    None where another program wrote the file. Raises UserError where the file is damaged.
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
            raise UserError(
                f'{file}: "labels" must be a list of [path, number], but has {entry!r:.80}'
            )
    return labels


def _list_stylegan(file: pathlib.Path, labels: list, left_out: LeftOut) -> _Listing:
    """List the images that a dataset.json labels; where it has no labels, all of its folder."""
    if not labels:
        paths = _walk(file.parent, left_out)
        return _Listing(file.parent, paths, [None] * len(paths))

    lines = (
        _Line(number, path.replace("\\", "/"), str(label))
        for number, (path, label) in enumerate(labels, start=1)
    )
    listing = _list_lines(file, lines)
    labelled = set(listing.paths)
    unlabelled = [path for path in _walk(file.parent, LeftOut()) if path not in labelled]
    if unlabelled:
        left_out.add(f"image without a label in {STYLEGAN}", unlabelled[0], len(unlabelled))
    return listing
