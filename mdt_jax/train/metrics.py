"""What is logged: means since the line before, and metrics.jsonl, which has each logged step once,
however often the run was stopped.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular


def read_steps(path: str | os.PathLike) -> list[tuple[int, str]]:
    """(step, line) of every whole line; UserError for a line that is not one of ours."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            lines = [line for line in file if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
            step = json.loads(text)["step"]
            if type(step) is not int:
                raise TypeError(step)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number} is no line of metrics; take it out") from None
        steps.append((step, text))
    return steps


LATEST = ("skipped", "skipped_in_row")  # counts, of which the last one is logged


class Means:
    """The mean of each metric of the steps since the line before.

    Steps that were skipped do not count, nor do values that are not finite, such as the mean over a
    quarter of the timesteps that a batch has none of.
    """

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None):
        """sums: those of the steps before a stop."""
        self._sums = {name: list(each) for name, each in (sums or {}).items()}
        self._latest: dict[str, float] = {}

    @property
    def sums(self) -> dict[str, list[float]]:
        """(sum, count) of each metric, for a checkpoint: JSON keeps all bits of a number."""
        return {name: list(each) for name, each in self._sums.items()}

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """The metrics of the next step: numbers as `train.step` gives them."""
        values = {name: value.item() for name, value in metrics.items()}
        self._latest = {name: values.pop(name) for name in LATEST}
        applied = self._latest["skipped_in_row"] == 0
        for name, value in values.items():
            each = self._sums.setdefault(name, [0.0, 0])
            if applied and math.isfinite(value):
                each[0] += value
                each[1] += 1

    def take(self) -> dict[str, float]:
        """The means, NaN where nothing counts, and the latest counts; then begin anew."""
        means = {
            name: total / count if count else math.nan
            for name, (total, count) in self._sums.items()
        }
        self._sums = {}
        return means | self._latest


class MetricsLog:
    """A `Tracker` that appends lines.

    Opening it at `step` drops what a killed run wrote after that step.
    """

    def __init__(self, path: str | os.PathLike, step: int):
        kept = [line for number, line in read_steps(path) if number <= step]
        temporary = f"{path}.tmp"
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.writelines(kept)
        os.replace(temporary, path)
        self._file = open(path, "a")  # noqa: SIM115 (closed in close)

    def close(self) -> None:
        self._file.close()

    def flush(self) -> None:
        self._file.flush()

    def image(self, step: int, path: os.PathLike) -> None:
        """Pictures lie beside it."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line. Numbers that are not finite become null: JSON has no NaN."""
        values = {name: _number(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()


def _number(value) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None
