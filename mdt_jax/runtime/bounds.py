"""What the value of a config field or of a sampling option must be."""

import dataclasses
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from mdt_jax.runtime import limits
from mdt_jax.runtime.errors import UserError

KINDS = {int: numbers.Integral, float: numbers.Real}  # NumPy's numbers, too


@dataclasses.dataclass(frozen=True)
class Bound:
    """A condition on a value; words: what the value must be, for messages and lists of fields."""

    holds: Callable[[Any], bool]
    words: str


ANY = Bound(lambda value: True, "")


def at_least(least: float, note: str = "") -> Bound:
    """note: what follows "at least 1" in messages."""
    return Bound(lambda value: value >= least, f"at least {least}{note}")


def above(bound: float) -> Bound:
    return Bound(lambda value: value > bound, f"above {bound}")


def between(low: float, high: float) -> Bound:
    """Both ends included."""
    return Bound(lambda value: low <= value <= high, f"in [{low}, {high}]")


def half_open(low: float, high: float, high_text: str = "") -> Bound:
    """`low` included, `high` excluded."""
    return Bound(lambda value: low <= value < high, f"in [{low}, {high_text or high})")


def one_of(choices: Iterable[str]) -> Bound:
    names = tuple(choices)
    return Bound(lambda value: value in names, f"one of {', '.join(names)}")


def check(name: str, value: Any, kind: Any, bound: Bound = ANY) -> None:
    """Raise UserError, naming the field, for a value of another type, NaN, infinity, a number
    beyond all use, or a value outside the bound.

    kind: bool, int, float, str or a union of types; int and float accept NumPy's numbers, and
    float accepts whole numbers.
    """
    number = kind in KINDS
    if not isinstance(value, KINDS.get(kind, kind)) or (number and isinstance(value, bool)):
        expected = getattr(kind, "__name__", str(kind))
        raise UserError(f"{name} is {value!r}; it must be of type {expected}")
    if number:
        limits.check_number(name, value)
    if not bound.holds(value):
        raise UserError(f"{name} is {value!r}; it must be {bound.words}")
