"""What a source of image files found, and what it leaves out, for whoever reads its messages."""

import collections
import os
import re
from collections.abc import Collection, Iterable

import numpy as np

# A word in the name of a part that a set is divided into, as in train, img_val, testset, trainA.
# The group that matches tells which part.
SPLIT = re.compile(
    r"(?<![a-z])(?:(train)(?:ing)?|(val)(?:id|idation)?|(test)(?:ing)?|(dev)|(eval)(?:uation)?)"
    r"(?=(?:set|[ab])?(?![a-z]))",
    re.IGNORECASE,
)
KINDS = 12  # of what is left out that are named one by one


class LeftOut:
    """Files and folders that are not read: of each kind how many, and one of them."""

    def __init__(self):
        self._counts = collections.Counter()
        self._examples: dict[str, str] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        self._counts[kind] += count
        self._examples.setdefault(kind, name)

    def add_unknown(self, name: str) -> None:
        """A file that is no picture by its name."""
        suffix = os.path.splitext(name)[1].lower()
        self.add(f"unknown suffix {suffix}" if suffix else "no suffix", name)

    def __str__(self) -> str:
        """All of it in a line, what is most first; empty where nothing is left out."""
        kinds = self._counts.most_common()
        said = [
            f"{kind}: {count} ({'such as ' if count > 1 else ''}{self._examples[kind]})"
            for kind, count in kinds[:KINDS]
        ]
        if len(kinds) > KINDS:
            said.append(f"other kinds: {sum(count for _, count in kinds[KINDS:])}")
        return "; ".join(said)


def describe(count: int, labels: np.ndarray | None, classes: list[str], left_out: str) -> str:
    """How many images of how many classes there are, the least and the most of a class.

    labels: [count] int, None where they are not known; left_out: as of LeftOut.
    """
    of = f"of {len(classes)} classes" if classes else "without classes"
    text = f"{count} image{'s' * (count != 1)} {of}"
    if classes and labels is not None:
        each = np.bincount(labels, minlength=len(classes))
        least, most = int(each.argmin()), int(each.argmax())
        text += f", {each[least]}"
        if each[least] < each[most]:
            text = f"{text} ({classes[least]}) to {each[most]} ({classes[most]})"
        text += " each"
        if not each[least]:
            text += f", {np.count_nonzero(each == 0)} without images"
    return text + (f"; left out: {left_out}" if left_out else "")


def splits(folders: Iterable[str]) -> tuple[str, list[str]] | None:
    """(folder, names) where one holds several of train, val, test, …, the one to train on first.

    They are parts of one set where their names are the same but for this word and for numbers.
    folders: paths of those that images lie in, with "/" between; "" is the top.
    """
    inside: dict[tuple[str, str], dict[str, str]] = {}
    for path in folders:
        parts = path.split("/")
        for n, part in enumerate(parts):
            name = part.removesuffix(".tar")
            if match := SPLIT.search(name):
                kind = next(filter(None, match.groups())).lower()
                rest = f"{name[: match.start()]}{name[match.end() :]}".casefold()
                rest = re.sub(r"[-_. 0-9]", "", rest)
                inside.setdefault(("/".join(parts[:n]), rest), {})[part] = kind
    for (folder, _), names in sorted(inside.items()):
        if len(set(names.values())) > 1:
            return folder, sorted(names, key=lambda name: (names[name] != "train", name))
    return None


def holder(folders: Collection[str]) -> str:
    """The innermost folder of all images, where these lie in several folders in it; else "".

    folders: as of `splits`.
    """
    if len(folders) < 2 or "" in folders:
        return ""
    common = os.path.commonpath(folders)
    return common if common not in folders else ""
