"""What the listings of image files have in common, be they in folders, a tar or a prepared set."""

import abc
import collections
import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import BinaryIO

import numpy as np

# A word for a split in the name of a folder: train, img_val, testset, trainA. The group that
# matches tells which split.
SPLIT = re.compile(
    r"(?<![a-z])(?:(train)(?:ing)?|(val)(?:id|idation)?|(test)(?:ing)?|(dev)|(eval)(?:uation)?)"
    r"(?=(?:set|[ab])?(?![a-z]))",
    re.IGNORECASE,
)
MAX_KINDS = 12  # kinds of files left out that a message names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFiles(abc.ABC):
    """Image files numbered from 0, with labels.

    labels: [N] int32; None where only reading an image tells its label. classes: the names of the
    labels 0, 1, …; empty without labels. left_out: the other files, as text of `LeftOut`.
    """

    labels: np.ndarray | None
    classes: list[str]
    left_out: str = ""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """The name of image i in messages."""

    @abc.abstractmethod
    def read(self, i: int) -> tuple[str | os.PathLike | BinaryIO, int]:
        """(path or encoded content of image i, its label). Raises OSError or UserError."""

    def read_ahead(self, items: Sequence[int]) -> Mapping[int, tuple[BinaryIO, int]]:
        """`read` of those images that are quicker read at once than one by one: none, on a disk."""
        return {}

    @property
    @abc.abstractmethod
    def contents(self) -> str:
        """A text that differs between sets, for example a list of all images and labels."""

    @property
    def summary(self) -> str:
        """The numbers of images and classes, the smallest and largest class, what is left out."""
        count = len(self)
        text = f"{count} image{'s' * (count != 1)} "
        text += f"of {len(self.classes)} classes" if self.classes else "without classes"
        if self.classes and self.labels is not None:
            sizes = np.bincount(self.labels, minlength=len(self.classes))
            least, most = int(sizes.argmin()), int(sizes.argmax())
            text += f", {sizes[least]}"
            if sizes[least] < sizes[most]:
                text += f" ({self.classes[least]}) to {sizes[most]} ({self.classes[most]})"
            text += " each"
            if not sizes[least]:
                text += f", {np.count_nonzero(sizes == 0)} without images"
        return text + (f"; left out: {self.left_out}" if self.left_out else "")


class LeftOut:
    """Files and folders that are not read: the number of each kind, and one example."""

    def __init__(self):
        self._counts = collections.Counter()
        self._examples: dict[str, str] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count a file, or `count` files, of which `name` is one."""
        self._counts[kind] += count
        self._examples.setdefault(kind, name)

    def add_unknown(self, name: str) -> None:
        """Count a file whose suffix is not an image's."""
        suffix = os.path.splitext(name)[1].lower()
        self.add(f"unknown suffix {suffix}" if suffix else "no suffix", name)

    def __str__(self) -> str:
        """One line, the most frequent kinds first; empty where nothing is left out."""
        kinds = self._counts.most_common()
        texts = [
            f"{kind}: {count} ({'e.g. ' if count > 1 else ''}{self._examples[kind]})"
            for kind, count in kinds[:MAX_KINDS]
        ]
        if len(kinds) > MAX_KINDS:
            texts.append(f"other kinds: {sum(count for _, count in kinds[MAX_KINDS:])}")
        return "; ".join(texts)


def sort_classes(names: Collection[str]) -> list[str]:
    """The names sorted; as numbers where all are numbers, so that 10 comes after 2."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def number_labels(names: Iterable[str], classes: list[str]) -> np.ndarray:
    """The index among `classes` of each name: [N] int32."""
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in names], np.int32)


def class_in_name(path: str) -> str | None:
    """The ClassID of a file named ClassID_ImgID.jpg; None for other names."""
    head, underscore, _ = os.path.basename(path).partition("_")
    return head if underscore and head else None


def find_splits(folders: Iterable[str]) -> tuple[str, list[str]] | None:
    """(folder, the names in it) of a folder that holds splits (train, val, test, …), train first.

    Names are splits of one set where they differ only in that word and in numbers. folders: the
    paths of the folders that hold images, with "/" between; "" is the root.
    """
    splits: dict[tuple[str, str], dict[str, str]] = {}  # by (folder, rest of the name)
    for path in folders:
        parts = path.split("/")
        for n, part in enumerate(parts):
            name = part.removesuffix(".tar")
            if match := SPLIT.search(name):
                word = next(filter(None, match.groups())).lower()
                rest = f"{name[: match.start()]}{name[match.end() :]}".casefold()
                rest = re.sub(r"[-_. 0-9]", "", rest)
                splits.setdefault(("/".join(parts[:n]), rest), {})[part] = word
    for (folder, _), words in sorted(splits.items()):
        if len(set(words.values())) > 1:
            return folder, sorted(words, key=lambda name: (words[name] != "train", name))
    return None
