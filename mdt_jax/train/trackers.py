"""Where the log of a run goes besides metrics.jsonl: TensorBoard, Weights & Biases, stderr."""

import dataclasses
import datetime
import pathlib
import re
import secrets
import sys
from typing import Protocol

import numpy as np

from mdt_jax.data.images import open_image
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, atomic_write, fetched
from mdt_jax.runtime.hosts import log0


@dataclasses.dataclass(frozen=True)
class Monitoring:
    """How a run is shown besides metrics.jsonl.

    wandb: the name of a project, or "". profile_steps: the steps to trace, "FIRST:LAST", or "".
    """

    tensorboard: bool = False
    wandb: str = ""
    profile_steps: str = ""


class Tracker(Protocol):
    """Shows or keeps the numbers of a run. Only the first process has trackers.

    Steps are counted from 1 and never decrease. Several calls may have the same step.
    """

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: Python or NumPy numbers by name; they may be NaN or infinite."""
        ...

    def image(self, step: int, path: Path) -> None:
        """path: a grid of samples, a PNG file in the workdir."""
        ...

    def flush(self) -> None:
        """Return once everything written survives a crash of this process."""
        ...

    def close(self) -> None:
        """Release files and connections. Called once, at the end."""
        ...


def open_trackers(
    folder: pathlib.Path, config: dict, step: int, tensorboard: bool, wandb: str, name: str = ""
) -> list[Tracker]:
    """The trackers of a run that starts or resumes at `step`.

    folder: where they write their files. TensorBoard drops what it showed of later steps; W&B keeps
    it. wandb: the name of a project, or ""; name: of the run there, by default the folder's. Raises
    UserError where the package is not installed or access is denied.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", step))
    if wandb:
        trackers.append(Wandb(folder, name or folder.name, config, wandb))
    return trackers


def on_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar can move."""
    return sys.stderr is not None and sys.stderr.isatty()


def _missing(flag: str, package: str) -> UserError:
    return UserError(f"{flag} needs the package {package}: pip install {package}")


def _picture(path: Path) -> np.ndarray:
    with open_image(fetched(path)) as image:
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

    def image(self, step: int, path: Path) -> None:
        self._writer.add_image("samples", _picture(path), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. Each workdir has one, also after it resumed."""

    def __init__(self, folder: pathlib.Path, name: str, config: dict, project: str):
        try:
            import wandb
            from wandb.errors import Error
        except ImportError:
            raise _missing("--wandb", "wandb") from None
        number = folder / "wandb" / "run-id"
        number.parent.mkdir(exist_ok=True)
        known = number.read_text(errors="replace") if number.exists() else ""
        if not re.fullmatch(r"[\w-]+", known):  # a crash may leave it empty, or full of zeros
            known = secrets.token_hex(8)
            with atomic_write(number) as temporary:
                temporary.write_text(known)
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project, dir=str(folder), name=name, id=known,
                resume="allow", config=config,
            )  # fmt: skip
        except Error as error:
            raise UserError(f"--wandb={project}: {error}") from None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def image(self, step: int, path: Path) -> None:
        self._run.log({"samples": self._image(str(fetched(path)))}, step=step)

    def flush(self) -> None:
        """Do nothing: W&B's own process has the numbers already."""

    def close(self) -> None:
        self._run.finish()


class Lines:
    """Prints a line to stderr for each logged step, where stderr is a file and no bar can move.

    steps: the last step of the run.
    """

    def __init__(self, steps: int):
        self._steps = steps

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" not in metrics:  # measures of samples are printed by Run.measure
            return
        left = datetime.timedelta(seconds=round(float(metrics["eta_seconds"])))
        log0(
            f"step {step}/{self._steps}: loss {metrics['loss']:.4f}, "
            f"grad_norm {metrics['grad_norm']:.3g}, "
            f"{metrics['images_per_second']:.4g} img/s, {left} left"
        )

    def image(self, step: int, path: Path) -> None:
        log0(f"step {step}: samples in {path}")

    def flush(self) -> None:
        """Do nothing: each line is printed at once."""

    def close(self) -> None:
        """Do nothing: stderr stays open."""
