"""What class a person means by a number or a name, in a run's own words or in ImageNet's."""

import difflib
import functools
import pathlib
import re
from collections.abc import Collection, Sequence

from mdt_jax.runtime.errors import UserError


def parse_label(text: str, num_classes: int, names: Sequence[str], where: str) -> int:
    """The class that is meant by `text`, in 0…num_classes − 1.

    names: the run's own, of class 0, 1, …; empty where none are known. The text may be one of them
    (where none is written just so, capitals and underscores do not matter, and numbers count by
    their value: 01 is 1), or the number of a class. `name:TEXT` and `number:TEXT` say which. Where
    the classes are ImageNet's (`imagenet_among`), it may be an ImageNet name or WordNet number.
    where: what a message begins with. Raises UserError for a text that means no class, or several.
    """
    only, _, rest = text.partition(":")
    only, said = (only, rest.strip()) if says_which(text) and text not in names else ("", text)
    named = _named(said, names) if only != "number" else []
    value = _whole(said) if only != "name" else None
    found = set(named)
    # Who writes 01, where that is a name, means the name.
    number = None if named and said in names and said != str(value) else value
    if number is not None and 0 <= number < num_classes:
        found.add(number)
    if len(found) == 1:
        return found.pop()
    if found:
        readings = [f"class {n} by its name {names[n]!r}" for n in named]
        ways = [f"name:{names[n]}" for n in named]
        if number in found:
            readings.append(f"class {number} by its number, which is named {names[number]!r}")
            ways.append(f"number:{number}")
        may, say = " or ".join(readings), " or ".join(ways)
        raise UserError(f"{where}: {said!r} may be {may}; say {say}")
    if value is not None:
        raise UserError(f"{where}: label {said} is outside the classes 0 to {num_classes - 1}")
    among = imagenet_among(num_classes, names)
    if said and among is not None and only != "number":
        try:
            return imagenet_label(said, among)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    words = [name for name in names if _whole(name) is None] if said else []
    near = difflib.get_close_matches(said, words, n=3) or words[:1]
    hint = f", nor a class of the run such as {', '.join(near)}" if near else ""
    raise UserError(f"{where}: {said!r} is no class number such as 3{hint}")


def says_which(text: str) -> bool:
    """Whether a text says that it is a name, or that it is a number."""
    return text.startswith(("name:", "number:"))


def _named(text: str, names: Sequence[str]) -> list[int]:
    """The classes that go by this name; several where it is written unlike them all."""
    if text in names:
        return [names.index(text)]
    plain, value = _plain(text), _whole(text)
    return [
        number
        for number, name in enumerate(names)
        if _plain(name) == plain or (value is not None and _whole(name) == value)
    ]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _whole(text: str) -> int | None:
    """The value of a whole number in a usual form: 7, 07, +7, 7.0. None for any other text."""
    usual = re.fullmatch(r"([+-]?[0-9]{1,4000})(\.0*)?", text)
    return int(usual[1]) if usual else None


def correspond(
    numbers: Collection[int], names: Sequence[str], others: Collection[int], their: Sequence[str]
) -> dict[int, int]:
    """Number of a class in one set → in another, for each of `numbers` that has its like there.

    names, their: what either set calls class 0, 1, …; empty where it has numbers alone. others: the
    numbers in the other set. By name, where both have names. Raises UserError where it is not
    clear which names numbers stand for.
    """
    if names and their:
        there = {name: number for number, name in enumerate(their)}
        return {n: there[names[n]] for n in numbers if names[n] in there}
    if their:
        return _places(numbers, their)
    if names:
        there = {place: number for number, place in _places(others, names).items()}
        return {n: there[n] for n in numbers if n in there}
    return {number: number for number in numbers}


def _places(numbers: Collection[int], names: Sequence[str]) -> dict[int, int]:
    """Number → its class among the names, for those that have one.

    A number is the place of a class, as in training; but where names are numbers, and some of the
    numbers are no place, it is a name.
    """
    values = {str(name): place for place, name in enumerate(names) if _whole(name) is not None}
    by_place = {n: n for n in numbers if 0 <= n < len(names)}
    by_name = {n: values[str(n)] for n in numbers if str(n) in values}
    if len(by_name) < len(set(numbers)):
        return by_place
    if len(by_place) < len(by_name):
        return by_name
    # Folders named 1, 2, … are numbered from 0 all the same, and so are samples of them.
    counted = [str(n) for n in range(1, len(names) + 1)]
    if by_place != by_name and list(names) != counted:
        n = next(n for n in by_place if by_place[n] != by_name[n])
        raise UserError(
            f"the label {n} may be class {n} by its number ({names[n]!r}) or class {by_name[n]} by "
            "its name; give both sets names, such as a folder for each class"
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


def imagenet_among(num_classes: int, names: Sequence[str]) -> Sequence[int] | None:
    """Which of ImageNet's classes those of a run are; None where they are not ImageNet's.

    They are, where all names are WordNet numbers of ImageNet's (n01440764), or where no names are
    known of a thousand classes, as of released weights.
    """
    labels = {wordnet: label for label, (wordnet, _) in enumerate(_imagenet())}
    if not names:
        return range(len(labels)) if num_classes == len(labels) else None
    found = [labels[name] for name in names if name in labels]
    return found if len(found) == len(names) else None


def imagenet_label(name: str, among: Sequence[int] | None = None) -> int:
    """The place in `among`, by default all of ImageNet's labels, of a class by one of its names.

    Capitals and underscores do not matter; a WordNet number is a name, too. Raises UserError for a
    name that is unknown, with the nearest ones, or that two classes share.
    """
    classes, wanted = _imagenet(), _plain(name)
    among = range(len(classes)) if among is None else among
    places: dict[str, list[int]] = {}
    for place, label in enumerate(among):
        for known in (classes[label][0], *classes[label][1]):
            places.setdefault(_plain(known), []).append(place)
    found = list(dict.fromkeys(places.get(wanted, [])))
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{place} ({_among_its_like(among[place])})" for place in found)
        raise UserError(f"label {name!r} names several classes: {choices}; give the number")
    words = {*wanted.split(), wanted.removesuffix("s")}
    near = [known for known in places if words & set(re.findall(r"\w+", known))][:4]
    near += [n for n in difflib.get_close_matches(wanted, places, n=3) if n not in near]
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise UserError(f"label {name!r} is no ImageNet class{hint}")


def _among_its_like(label: int) -> str:
    """The classes before and after: their order is WordNet's, so they are of a kind."""
    names = imagenet_names()
    return f"beside {names[label - 1][0]} and {names[(label + 1) % len(names)][0]}"
