"""The log of a run: means of metrics in metrics.jsonl and in trackers, and a progress bar."""

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, as_path, atomic_write, check_regular
from mdt_jax.runtime.progress import progress_bar
from mdt_jax.train import costs
from mdt_jax.train.speed import Speed
from mdt_jax.train.trackers import Tracker, on_terminal

if TYPE_CHECKING:
    from mdt_jax.train.run import Run

LATEST = ("learning_rate", "skipped", "skipped_in_row")  # the last value is logged, not the mean


class Log:
    """Logs each step one step late, so that the devices never wait for the host.

    Every `train.log_every` steps the trackers get the means since the last line. skipping: whether
    the last step that was logged was not finite.
    """

    def __init__(self, run: "Run", model: MDT, images: int, trackers: Sequence[Tracker]):
        """images: how many an epoch has; trackers: only process 0 has them."""
        self.skipping = False
        self._run, self._config, self._trackers = run, run.config, trackers
        self._epoch_images = images
        self._waiting: tuple[int, dict] | None = None  # metrics that are still on the devices
        self._seconds_before = run.clock.seconds()
        flops = costs.training_flops(run.config, model)
        peak = costs.peak_flops(jax.devices()[0].device_kind)
        self._speed = Speed(run.clock, run.start, run.config.data.batch_size, flops, peak)
        shown, steps = hosts.is_first() and on_terminal(), run.config.train.steps
        self._progress: Any = progress_bar(steps, shown, "training", "step", run.start)

    def __enter__(self) -> "Log":
        with contextlib.ExitStack() as opened:
            for tracker in self._trackers:
                opened.callback(tracker.close)
            self._bar = opened.enter_context(self._progress)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._opened.__exit__(*error)

    def write(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step, and log those of the step before.

        Raises UserError after train.max_skipped non-finite steps in a row.
        """
        self.catch_up()
        self._waiting = step, metrics

    def write_now(self, step: int, values: dict[str, float]) -> None:
        """Log values that are on the host, for example measures of samples."""
        for tracker in self._trackers:
            tracker.write(step, values)

    def image(self, step: int, path: Path) -> None:
        """Show a grid of samples, a PNG."""
        for tracker in self._trackers:
            tracker.image(step, path)

    def flush(self) -> None:
        """Return once everything written survives a crash of this process.

        The files of trackers are then in the bucket, too, if the workdir is in one.
        """
        for tracker in self._trackers:
            tracker.flush()
        if hosts.is_first():
            self._run.mirror.push()

    def catch_up(self) -> None:
        """Log the step whose metrics are not logged yet, if any."""
        if self._waiting is None:
            return
        (step, on_devices), self._waiting = self._waiting, None
        metrics, train = jax.device_get(on_devices), self._config.train
        self._run.means.add(metrics)
        if step % train.log_every == 0:
            self.write_now(step, self._line(step))
        self._move_bar(step, metrics["loss"])
        self.skipping = bool(metrics["skipped_in_row"] > 0)
        if metrics["skipped_in_row"] >= train.max_skipped:
            raise UserError(self._diverged(step))

    def _line(self, step: int) -> dict[str, float]:
        return self._run.means.take() | {
            "epoch": round(step * self._config.data.batch_size / self._epoch_images, 6),
            **self._speed.since(step, self._config.train.steps),
            "compile_seconds": self._run.compile_seconds,
        }

    def _move_bar(self, step: int, loss: float) -> None:
        seconds = self._run.clock.seconds() - self._seconds_before
        per_step, size = seconds / (step - self._run.start), self._config.data.batch_size
        text = f"{size / per_step:.0f} img/s, {1000 * per_step:.0f} ms a step, loss {loss:.3f}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)

    def _diverged(self, step: int) -> str:
        steps = self._config.train.max_skipped
        text = f"the loss or gradient was not finite for {steps} steps in a row, up to step {step}"
        newest = self._run.checkpoints.newest()
        if newest is None:
            return (
                f"{text}; there is no checkpoint yet: lower optim.lr or set optim.clip_norm, and "
                "run again in another workdir"
            )
        return (
            f"{text}; the last good checkpoint is {newest}: lower optim.lr or set "
            "optim.clip_norm, and run again"
        )


def read_steps(path: str | os.PathLike) -> list[tuple[int, str]]:
    """(step, line) of each complete line. Raises UserError for a line that holds no metrics."""
    path = as_path(path)
    try:
        check_regular(path)
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = [line for line in io.BytesIO(content) if line.endswith(b"\n")]
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


class Means:
    """The mean of each metric over the steps since the last line.

    Skipped steps do not count. Neither do values that are not finite, for example the mean over a
    quarter of the timesteps of which the batch has none.
    """

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None):
        """sums: as `sums` was when the run stopped."""
        self._sums = {name: list(each) for name, each in (sums or {}).items()}
        self._latest: dict[str, float] = {}

    @property
    def sums(self) -> dict[str, list[float]]:
        """(sum, count) of each metric, for a checkpoint. JSON keeps all bits of a number."""
        return {name: list(each) for name, each in self._sums.items()}

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Add the metrics of the next step, scalars of `train.step`."""
        values = {name: value.item() for name, value in metrics.items()}
        self._latest = {name: values.pop(name) for name in LATEST}
        # The number that was set, not the float32 nearest to it.
        self._latest["learning_rate"] = float(str(metrics["learning_rate"]))
        applied = self._latest["skipped_in_row"] == 0
        for name, value in values.items():
            each = self._sums.setdefault(name, [0.0, 0])
            if applied and math.isfinite(value):
                each[0] += value
                each[1] += 1

    def take(self) -> dict[str, float]:
        """Return the means (NaN where no step counts) and the latest values, and start over."""
        means = {
            name: total / count if count else math.nan
            for name, (total, count) in self._sums.items()
        }
        self._sums = {}
        return means | self._latest


class MetricsLog:
    """A `Tracker` that appends lines to metrics.jsonl, one for each logged step.

    Opening it at `step` drops the lines that a killed run wrote after that step.
    """

    def __init__(self, path: str | os.PathLike, step: int):
        kept = [line for line_step, line in read_steps(path) if line_step <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8", newline="")
        self._file = open(path, "a")  # noqa: SIM115 (closed in close)

    def close(self) -> None:
        self._file.close()

    def flush(self) -> None:
        self._file.flush()

    def image(self, step: int, path: Path) -> None:
        """Do nothing: sample grids are files in the workdir."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line. Numbers that are not finite become null, since JSON has no NaN."""
        values = {name: _number(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()


def _number(value) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None
