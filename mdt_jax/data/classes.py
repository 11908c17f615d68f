"""ImageNet's thousand classes by name."""

import difflib
import functools
import pathlib
import re

from mdt_jax.errors import UserError


@functools.cache
def imagenet_names() -> list[list[str]]:
    """Names of each class in the order of the labels (ILSVRC2012's, sorted by WordNet number)."""
    lines = pathlib.Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines()
    return [line.split(", ") for line in lines]


def imagenet_label(name: str) -> int:
    """The label of a class by one of its names, capitals aside.

    Raises UserError for a name that is unknown, with the nearest ones, or that two classes share.
    """
    wanted = " ".join(name.casefold().split())
    labels: dict[str, list[int]] = {}
    for label, names in enumerate(imagenet_names()):
        for known in names:
            labels.setdefault(known.casefold(), []).append(label)
    found = labels.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{label} ({_among_its_like(label)})" for label in found)
        raise UserError(f"label {name!r} names several classes: {choices}; give the number")
    words = {*wanted.split(), wanted.removesuffix("s")}
    near = [known for known in labels if words & set(re.findall(r"\w+", known))][:4]
    near += [n for n in difflib.get_close_matches(wanted, labels, n=3) if n not in near]
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise UserError(f"label {name!r} is no ImageNet class{hint}")


def _among_its_like(label: int) -> str:
    """The classes before and after: their order is WordNet's, so they are of a kind."""
    names = imagenet_names()
    return f"beside {names[label - 1][0]} and {names[(label + 1) % len(names)][0]}"
