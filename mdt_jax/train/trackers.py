"""What shows a run while it goes, besides metrics.jsonl: TensorBoard, W&B, a profiler's trace."""

import datetime
import pathlib
import re
import secrets
from typing import Protocol

import jax
import numpy as np

from mdt_jax.data.images import open_image
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write
from mdt_jax.runtime.hosts import log0


class Tracker(Protocol):
    """What shows or keeps the numbers of a run; in the first process alone.

    Steps are counted from 1 and never go back; several calls may be of the same step.
    """

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: numbers of Python's or NumPy's by name, some perhaps not finite."""
        ...

    def image(self, step: int, path: pathlib.Path) -> None:
        """path: a grid of samples, a PNG in the workdir."""
        ...

    def flush(self) -> None:
        """Return once what was written survives a crash of this process."""
        ...

    def close(self) -> None:
        """To be called once, at the end."""
        ...


def open_trackers(
    workdir: pathlib.Path, config: dict, step: int, tensorboard: bool, wandb: str
) -> list[Tracker]:
    """Those asked for.

    step: where the run goes on; what TensorBoard showed of later steps gives way, W&B keeps its
    own. wandb: a project's name, or "". Raises UserError where the package or the access is not
    there.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(workdir / "tensorboard", step))
    if wandb:
        trackers.append(Wandb(workdir, config, wandb))
    return trackers


def _missing(flag: str, package: str) -> UserError:
    return UserError(f"{flag} needs the package {package}: pip install {package}")


def _picture(path: pathlib.Path) -> np.ndarray:
    with open_image(path) as image:
        return np.asarray(image.convert("RGB"))


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: pathlib.Path, step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise _missing("--tensorboard", "tensorboardX") from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=2)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def image(self, step: int, path: pathlib.Path) -> None:
        self._writer.add_image("samples", _picture(path), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; the same workdir goes on in the same one."""

    def __init__(self, workdir: pathlib.Path, config: dict, project: str):
        try:
            import wandb
            from wandb.errors import Error
        except ImportError:
            raise _missing("--wandb", "wandb") from None
        number = workdir / "wandb" / "run-id"
        number.parent.mkdir(exist_ok=True)
        known = number.read_text(errors="replace") if number.exists() else ""
        if not re.fullmatch(r"[\w-]+", known):  # a crash may leave it empty, or full of zeros
            known = secrets.token_hex(8)
            with atomic_write(number) as temporary:
                temporary.write_text(known)
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project, dir=str(workdir), name=workdir.name, id=known,
                resume="allow", config=config,
            )  # fmt: skip
        except Error as error:
            raise UserError(f"--wandb={project}: {error}") from None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def image(self, step: int, path: pathlib.Path) -> None:
        self._run.log({"samples": self._image(str(path))}, step=step)

    def flush(self) -> None:
        """Its own process has it already."""

    def close(self) -> None:
        self._run.finish()


class Lines:
    """A line on stderr for each one of metrics.jsonl, for logs where no bar can move.

    steps: of the whole run.
    """

    def __init__(self, steps: int):
        self._steps = steps

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" not in metrics:  # what was measured of samples is said where it is measured
            return
        left = datetime.timedelta(seconds=round(float(metrics["eta_seconds"])))
        log0(
            f"step {step}/{self._steps}: loss {metrics['loss']:.4f}, "
            f"grad_norm {metrics['grad_norm']:.3g}, "
            f"{metrics['images_per_second']:.4g} img/s, {left} left"
        )

    def image(self, step: int, path: pathlib.Path) -> None:
        log0(f"step {step}: samples in {path}")

    def flush(self) -> None:
        """Each line is there once it is printed."""

    def close(self) -> None:
        """Stderr stays open."""


class Profile:
    """A trace of some steps, for TensorBoard's or Perfetto's viewer.

    steps: "10:13", the first and the last, counted as metrics.jsonl does; "": none. Raises
    UserError for anything else.
    """

    def __init__(self, steps: str, folder: pathlib.Path):
        found = re.fullmatch(r"([0-9]+):([0-9]+)", steps)
        if steps and (not found or not 1 <= int(found[1]) <= int(found[2])):
            raise UserError(f"--profile_steps={steps} is not such as 10:13, first and last step")
        self._first, self._last = (int(found[1]), int(found[2])) if found else (0, 0)
        self._folder, self._running = folder, False

    def before(self, step: int, state) -> None:
        """To be called before step number `step` with the state that it starts from."""
        if self._first <= step <= self._last and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step > self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
