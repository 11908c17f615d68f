"""What a workdir tells about its run: config, curves, sample grids, measurements, report.

Nothing is written, so that a run may be looked at while it trains.
"""

import os
import re
from typing import NamedTuple

from mdt_jax.runtime.errors import DamagedError, UserError
from mdt_jax.runtime.files import Path, as_path, is_dir, is_file, names_in, read_json
from mdt_jax.train import curves
from mdt_jax.train.mirror import LOG
from mdt_jax.weights.step_folders import steps_in

GRID = re.compile(r"(\d{7,})\.png")


class Record(NamedTuple):
    """The record of a run.

    config: groups of fields; series: as of `curves.read`; grids: the pictures of samples by step;
    best: the step in best/, or None; report: report.json, {} until the run ends; step: the last
    that is logged.
    """

    workdir: Path
    config: dict[str, dict]
    series: curves.Series
    grids: dict[int, Path]
    best: int | None
    report: dict
    step: int

    @property
    def steps(self) -> int:
        """How many steps the run is to have."""
        return int(self.config.get("train", {}).get("steps") or 0)

    @property
    def state(self) -> str:
        """How far the run has got."""
        if self.report:
            return f"finished after {self.step:,} steps"
        return f"step {self.step:,} of {self.steps:,}"

    def measured(self, step: int) -> dict[str, float]:
        """What was measured at a step of the log."""
        found = {}
        for name, (steps, values) in self.series.items():
            if name in curves.TITLES and step in steps:
                found[name] = float(values[steps == step][-1])
        return found


def read(workdir: str | os.PathLike) -> Record:
    """The record of a workdir. Raises UserError where it holds no run, or damaged files."""
    workdir = as_path(workdir)
    if not is_dir(workdir) and not is_file(workdir / "config.json"):
        raise UserError(f"{workdir} does not exist; --workdir is the folder of a run")
    config = read_json(workdir / "config.json")
    if config is None:
        raise UserError(f"{workdir} holds no run: it has no config.json")
    series = curves.read(workdir / LOG)
    grids = {
        int(match[1]): workdir / "samples" / name
        for name in names_in(workdir / "samples")
        if (match := GRID.fullmatch(name))
    }
    best = steps_in(workdir / "best")
    report = read_json(workdir / "report.json") or {}
    whole = isinstance(report.get("steps", 0), int)
    if not whole or not all(isinstance(group, dict) for group in config.values()):
        raise DamagedError(f"config.json or report.json of {workdir} was not written by a run")
    logged = [int(steps[-1]) for steps, _ in series.values() if len(steps)]
    return Record(
        workdir, config, series, dict(sorted(grids.items())), best[0] if best else None, report,
        max([report.get("steps", 0), *logged]),
    )  # fmt: skip
