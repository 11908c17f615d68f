"""The class that a name or a number means, among a run's own classes or ImageNet's."""

import difflib
import functools
import pathlib
import re
from collections.abc import Collection, Sequence

from mdt_jax.runtime.errors import UserError

CRANE = 517  # the machine


def parse_label(text: str, num_classes: int, names: Sequence[str], prefix: str) -> int:
    """The class that `text` means, in 0…num_classes − 1.

    names: the run's names of class 0, 1, …; empty where it has none. The text may be a name (where
    no name is equal, capitals and underscores are ignored, and numbers are compared by value: 01 is
    1), or the number of a class; `name:TEXT` and `number:TEXT` are explicit. Where the classes are
    ImageNet's (`imagenet_among`), it may be an ImageNet name or WordNet number. prefix: of
    messages. Raises UserError for a text that means no class, or several.
    """
    kind, _, rest = text.partition(":")
    explicit = says_which(text) and text not in names
    kind, text = (kind, rest.strip()) if explicit else ("", text)
    by_name = _classes_named(text, names) if kind != "number" else []
    value = _parse_number(text) if kind != "name" else None
    # 01 means the name 01 where there is one, and not class 1.
    shadowed = bool(by_name) and text in names and text != str(value)
    by_number = value if not shadowed and value in range(num_classes) else None
    matches = set(by_name) if by_number is None else {*by_name, by_number}
    if len(matches) == 1:
        return matches.pop()
    if matches:
        readings = [f"class {n} by its name {names[n]!r}" for n in by_name]
        choices = [f"name:{names[n]}" for n in by_name]
        if by_number is not None:
            name = names[by_number]
            readings.append(f"class {by_number} by its number, which is named {name!r}")
            choices.append(f"number:{by_number}")
        may, choose = " or ".join(readings), " or ".join(choices)
        raise UserError(f"{prefix}: {text!r} may be {may}; give {choose}")
    if value is not None:
        raise UserError(f"{prefix}: label {text} is outside the classes 0 to {num_classes - 1}")
    among = imagenet_among(num_classes, names)
    if text and among is not None and kind != "number":
        try:
            return imagenet_label(text, among)
        except UserError as error:
            raise UserError(f"{prefix}: {error}") from None
    words = [name for name in names if _parse_number(name) is None] if text else []
    near = difflib.get_close_matches(text, words, n=3) or words[:1]
    hint = f", nor a class of the run (e.g. {', '.join(near)})" if near else ""
    raise UserError(f"{prefix}: {text!r} is no class number (e.g. 3){hint}")


def says_which(text: str) -> bool:
    """Whether a text declares itself a name or a number."""
    return text.startswith(("name:", "number:"))


def _classes_named(text: str, names: Sequence[str]) -> list[int]:
    """The classes of this name; several where it is spelled unlike all of them."""
    if text in names:
        return [names.index(text)]
    plain, value = _plain(text), _parse_number(text)
    return [
        number
        for number, name in enumerate(names)
        if _plain(name) == plain or (value is not None and _parse_number(name) == value)
    ]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _parse_number(text: str) -> int | None:
    """The value of a whole number in a usual form: 7, 07, +7, 7.0. None for any other text."""
    number = re.fullmatch(r"([+-]?[0-9]{1,4000})(\.0*)?", text)
    return int(number[1]) if number else None


def correspond(
    numbers: Collection[int], names: Sequence[str], others: Collection[int], their: Sequence[str]
) -> dict[int, int]:
    """Map class numbers of one set to those of another; classes that it lacks are left out.

    names, their: each set's names of class 0, 1, …; empty where it has only numbers. others: the
    numbers in the other set. Classes correspond by name where both sets have names. Raises
    UserError where it is ambiguous which names the numbers stand for.
    """
    if names and their:
        places = {name: number for number, name in enumerate(their)}
        return {n: places[names[n]] for n in numbers if names[n] in places}
    if their:
        return _places(numbers, their)
    if names:
        places = {place: number for number, place in _places(others, names).items()}
        return {n: places[n] for n in numbers if n in places}
    return {number: number for number in numbers}


def _places(numbers: Collection[int], names: Sequence[str]) -> dict[int, int]:
    """Map each number to a class among the names.

    A number is the index of a class, as in training. But where the names are numbers, and some of
    the numbers are no index, it is a name.
    """
    values = {name: place for place, name in enumerate(names) if _parse_number(name) is not None}
    by_place = {n: n for n in numbers if 0 <= n < len(names)}
    by_name = {n: values[str(n)] for n in numbers if str(n) in values}
    if len(by_name) < len(set(numbers)):
        return by_place
    if len(by_place) < len(by_name):
        return by_name
    # Folders named 1, 2, … are numbered from 0 like any others, and so are samples of them.
    counted = [str(n) for n in range(1, len(names) + 1)]
    if by_place != by_name and list(names) != counted:
        n = next(n for n in by_place if by_place[n] != by_name[n])
        raise UserError(
            f"the label {n} may be class {n} by its number ({names[n]!r}) or class {by_name[n]} by "
            "its name; give both sets names, for example a folder for each class"
        )
    return by_place


@functools.cache
def _imagenet() -> list[tuple[str, list[str]]]:
    """(WordNet number, names) of each class in the order of the labels, ILSVRC2012's."""
    lines = pathlib.Path(__file__).with_name("imagenet_classes.txt").read_text("utf-8").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1].split(", ")) for line in lines]


def imagenet_names() -> list[list[str]]:
    """Names of each class in the order of the labels (ILSVRC2012's, sorted by WordNet number)."""
    return [names for _, names in _imagenet()]


def hub_names() -> list[str]:
    """The names of ImageNet's classes in the hub's metadata."""
    texts = [", ".join(names) for names in imagenet_names()]
    texts[CRANE] += "2"  # another class has the same name
    return texts


def imagenet_among(num_classes: int, names: Sequence[str]) -> Sequence[int] | None:
    """The ImageNet labels of a run's classes; None where the classes are not ImageNet's.

    They are ImageNet's where all names are its WordNet numbers (n01440764), where they are the
    thousand names of the Hugging Face hub ("tench, Tinca tinca"), or where a thousand classes have
    no names, as in released weights.
    """
    labels = {wordnet: label for label, (wordnet, _) in enumerate(_imagenet())}
    if not names or list(names) == hub_names():
        return range(len(labels)) if num_classes == len(labels) else None
    known = [labels[name] for name in names if name in labels]
    return known if len(known) == len(names) else None


def imagenet_label(name: str, among: Sequence[int] | None = None) -> int:
    """The index in `among` (default: all of ImageNet's labels) of a class by one of its names.

    Capitals and underscores are ignored; a WordNet number is a name, too. Raises UserError for an
    unknown name, with the nearest ones, and for a name of two classes.
    """
    classes, wanted = _imagenet(), _plain(name)
    among = range(len(classes)) if among is None else among
    places: dict[str, list[int]] = {}
    for place, label in enumerate(among):
        for known in (classes[label][0], *classes[label][1]):
            places.setdefault(_plain(known), []).append(place)
    matches = list(dict.fromkeys(places.get(wanted, [])))
    if len(matches) == 1:
        return matches[0]
    if matches:
        choices = ", ".join(f"{place} ({_neighbours(among[place])})" for place in matches)
        raise UserError(f"label {name!r} names several classes: {choices}; give the number")
    words = {*wanted.split(), wanted.removesuffix("s")}
    near = [known for known in places if words & set(re.findall(r"\w+", known))][:4]
    near += [n for n in difflib.get_close_matches(wanted, places, n=3) if n not in near]
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise UserError(f"label {name!r} is no ImageNet class{hint}")


def _neighbours(label: int) -> str:
    """The classes before and after, which resemble a class, because the order is WordNet's."""
    names = imagenet_names()
    return f"beside {names[label - 1][0]} and {names[(label + 1) % len(names)][0]}"
