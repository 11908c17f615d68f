"""The runs that the page follows: a workdir, or the workdirs in a folder. Nothing is written."""

import shutil
from typing import NamedTuple

from mdt_jax.demo.handlers import said
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, atomic_write, fetched, is_file, names_in
from mdt_jax.train import page, record


class Shown(NamedTuple):
    """What the page shows of a run. state, curves, results, config: HTML; steps: of the grids."""

    state: str
    curves: str
    results: str
    config: str
    steps: list[int]


def clamped(place: float | None, count: int) -> int:
    """A place among `count` things, for what a slider or a program says."""
    return min(max(int(place or 0), 0), max(count - 1, 0))


class Runs:
    """The runs of a folder. Raises UserError where it has none.

    folder: for copies of sample grids. gradio serves files of the temporary folder alone.
    """

    def __init__(self, root: Path, folder: str):
        self.root, self.folder = root, folder
        if not self.names():
            raise UserError(f"--workdir={root} is no run, and holds none: there is no config.json")
        self._shown: dict[str, tuple[object, Shown]] = {}

    def names(self) -> list[str]:
        """The workdirs by their name in the folder; "." is the folder itself."""
        if is_file(self.root / "config.json"):
            return ["."]
        return [n for n in sorted(names_in(self.root)) if is_file(self.root / n / "config.json")]

    def show(self, name: str) -> Shown:
        """What there is of a run now; a mistake is its state."""
        try:
            found = self._record(name)
        except UserError as error:
            return Shown(said(str(error), error=True), "", "", "", [])
        values = sum(len(steps) for steps, _ in found.series.values())
        key = found.step, values, len(found.grids), found.best, bool(found.report)
        if self._shown.get(name, (None,))[0] != key:  # plots take a second
            shown = Shown(
                said(found.state.capitalize() + "."), page.plots(found.series),
                page.results(found), page.config(found), list(found.grids),
            )  # fmt: skip
            self._shown[name] = key, shown
        return self._shown[name][1]

    def grid(self, name: str, number: int) -> str | None:
        """The path of a copy of a sample grid, by its place; None where there is none."""
        try:
            grids = list(self._record(name).grids.values())
        except UserError:
            return None
        if not grids:
            return None
        grid = fetched(grids[clamped(number, len(grids))])
        copy = f"{self.folder}/run-{name}-{grid.name}"
        with atomic_write(copy) as temporary:  # another session may read it
            shutil.copyfile(grid, temporary)
        return copy

    def _record(self, name: str) -> record.Record:
        if name not in self.names():
            raise UserError(f"there is no run {name!r} in {self.root}")
        return record.read(self.root / name)
