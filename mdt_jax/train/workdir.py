"""The folder of a run: what may go on in it, and what is written there besides checkpoints."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from mdt_jax import __version__
from mdt_jax import config as configs
from mdt_jax.data import sample_notes
from mdt_jax.runtime import files, hosts
from mdt_jax.runtime.errors import DamagedError, UserError
from mdt_jax.runtime.files import atomic_write, read_json
from mdt_jax.train import inputs
from mdt_jax.train.checkpoints import Checkpoints
from mdt_jax.train.metrics import MetricsLog, read_steps
from mdt_jax.train.trackers import Tracker
from mdt_jax.weights.orbax_folders import FOLDER, steps_in

LOCK = ".lock"
# The folders of a run that it writes to, which may be links, or of somebody else.
WRITTEN = (
    FOLDER, "best", f"best/{FOLDER}", "samples", "damaged", "tensorboard", "wandb", "profile",
)  # fmt: skip


def check_same_run(meta: dict, config: ConfigDict, workdir: pathlib.Path, about_data: dict) -> None:
    """Raise UserError where a checkpoint is of another model, or further than the run is to go;
    print what else has changed.
    """
    if meta["step"] > config.train.steps:
        raise UserError(
            f"{workdir} is trained to step {meta['step']} already, and train.steps is "
            f"{config.train.steps}; set it to {meta['step']} or more, or choose another workdir"
        )
    was, now = meta.get("classes", about_data["classes"]), about_data["classes"]
    if was != now:
        raise UserError(
            f"{workdir} was trained with the classes {inputs.describe_classes(was)}; "
            f"the data now has {inputs.describe_classes(now)}"
        )
    if meta.get("images_sha256", about_data["images_sha256"]) != about_data["images_sha256"]:
        hosts.log0("going on with another list of images than before")
    old, new = configs.complete(meta["config"]).to_dict(), config.to_dict()
    changed = []
    for group, fields in new.items():
        for name, value in fields.items():
            before = old.get(group, {}).get(name)
            if before != value:
                changed.append((f"{group}.{name}", before, value))
    shape = (
        "model.", "data.image_size", "data.channels", "vae.", "diffusion.steps", "optim.name"
    )  # fmt: skip
    other = [f"{name} is {was}, not {now}" for name, was, now in changed if name.startswith(shape)]
    if other:
        raise UserError(
            f"{workdir} holds a checkpoint of another model or optimiser ({'; '.join(other)}); "
            "choose another workdir or the same config"
        )
    paths = {name for name, _, _ in changed}
    for name, is_ in about_data["files_sha256"].items():
        was = meta.get("files_sha256", {}).get(name, is_)  # older checkpoints do not tell
        group, _, field = name.partition(".")
        path = config[group][field]
        if was != is_ and path and name not in paths:
            raise UserError(
                f"{name} {path} has changed since {workdir} was trained with it: "
                f"its SHA-256 was {was[:12]} and is {is_[:12]}; put back what lay there, or choose "
                "another workdir"
            )
    for name, was, now in changed:
        hosts.log0(f"going on with {name} changed from {was} to {now}")


def check_nothing_is_lost(workdir: pathlib.Path) -> None:
    """Raise UserError where a run got past its first checkpoints but none is there any more."""
    steps = [step for step, _ in read_steps(workdir / "metrics.jsonl")]
    if not steps:
        return
    # The second save waits for the first, so after that a checkpoint must have been finished.
    try:
        every = int(_stored(workdir / "config.json")["train"]["checkpoint_every"])
    except (LookupError, TypeError, ValueError):
        every = 1
    if (workdir / "report.json").exists() or steps[-1] > 2 * every:
        raise UserError(
            f"{workdir} holds the metrics of {steps[-1]} steps but no checkpoint; put its "
            "checkpoints back, or train anew in another workdir"
        )
    hosts.log0(f"{workdir} was stopped after {steps[-1]} steps, before a checkpoint")


def agree_on_config(config: ConfigDict) -> None:
    """Raise UserError where the processes of a run have different configs or code."""
    fields = {f"{g}.{n}": v for g, names in config.to_dict().items() for n, v in names.items()}
    hosts.agree({"mdt_jax": __version__, "jax": jax.__version__} | fields)


def agree_on_start(workdir: pathlib.Path, about_data: dict) -> None:
    """Raise UserError where the processes see different data, or different things in the folder."""
    data = {"list of images": about_data["images_sha256"], "classes": about_data["classes"]}
    hosts.agree(data | about_data["files_sha256"], "; all must read the same data")
    found = {"checkpoints": steps_in(workdir), "a report": (workdir / "report.json").exists()}
    hosts.agree(found, f": {workdir} must be one folder for all")


def begin(
    workdir: pathlib.Path, config: ConfigDict, classes: list[str], start: int
) -> list[Tracker]:
    """Write what a run is of, and open its log, of the first process alone."""
    if not hosts.is_first():
        return []
    (workdir / "report.json").unlink(missing_ok=True)
    if start < config.train.steps:  # samples are of the step that the report is of
        for name in ("samples.npz", "samples.png"):
            (workdir / name).unlink(missing_ok=True)
    write_json(workdir / "config.json", config.to_dict())
    if classes:
        write_json(workdir / "classes.json", classes)
        hosts.log0(f"classes: {inputs.describe_classes(classes)}")
    return [MetricsLog(workdir / "metrics.jsonl", start)]


def is_reported(workdir: pathlib.Path, config: ConfigDict, step: int) -> bool:
    """Whether report.json is of this config at this step, and its samples can be read."""
    report, stored = _stored(workdir / "report.json"), _stored(workdir / "config.json")
    try:
        same = configs.complete(stored).to_dict() == config.to_dict()
    except (AttributeError, LookupError, TypeError, ValueError):  # fields of other forms
        return False
    if not (stored and same and report.get("steps") == step):
        return False
    if not (config.sample.num_samples and hosts.is_first()):
        return True
    return (workdir / "samples.png").exists() and sample_notes.is_whole(workdir / "samples.npz")


def _stored(path: pathlib.Path) -> dict:
    """What a JSON of the run holds; {} where it is not there, or is damaged: it is written anew."""
    try:
        return read_json(path) or {}
    except DamagedError as error:
        hosts.log0(f"{error}; it is written anew")
        return {}


def measured_steps(workdir: pathlib.Path, measures: Sequence[str], start: int) -> set[int]:
    """The steps up to `start` whose samples the log has one of the measures of."""
    found = read_steps(workdir / "metrics.jsonl") if hosts.is_first() else []
    found = [(step, json.loads(line)) for step, line in found if step <= start]
    steps = [step for step, line in found if not set(measures).isdisjoint(line)]
    return set(hosts.broadcast(steps))


def best_so_far(best: Checkpoints, config: ConfigDict, name: str) -> float:
    """The measure `name` of the best checkpoint; infinite where none was measured the same way."""

    def way(fields: dict) -> dict:
        of = {"evaluation": ("every",), "sample": ("num_samples", "batch_size")}
        return {
            f"{group}.{field}": value
            for group, but in of.items()
            for field, value in fields[group].items()
            if field not in but
        }

    found = [
        meta["measured"].get(name, math.inf)
        for meta in best.metas()
        if way(configs.complete(meta["config"]).to_dict()) == way(config.to_dict())
    ]
    return hosts.broadcast(min(found, default=math.inf))


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Keep other runs out of a workdir that is there; UserError where one is at work in it."""
    with hosts.alone(workdir / LOCK, f"workdir {workdir}"):
        yield


def check_free(workdir: pathlib.Path) -> None:
    """Raise UserError where a run is at work in a workdir, which need not be there."""
    if hosts.broadcast(os.path.exists(workdir / LOCK)):
        with alone(workdir):
            pass


def check_writable(workdir: pathlib.Path) -> None:
    """Raise UserError where this process can make no files in a workdir, which need not be there,
    or in one of its folders. All processes write checkpoints.
    """
    for name in ("", *WRITTEN):
        if not name or os.path.lexists(workdir / name):
            files.check_writable(workdir / name, f"workdir {workdir / name}")


def make(workdir: pathlib.Path) -> None:
    """Raise UserError where nothing can be written, or not all processes see what is."""
    probe = workdir / ".write-test"
    try:
        if hosts.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            probe.touch()
        hosts.all_hosts(True)  # wait for it
        if not _is_seen(probe):
            raise UserError(
                f"workdir {workdir} is not one folder for all processes: what process 0 writes "
                "there cannot be seen from this one"
            )
        hosts.all_hosts(True)
        if hosts.is_first():
            probe.unlink()
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written to: {error.strerror}") from None


def _is_seen(path: pathlib.Path) -> bool:
    with contextlib.suppress(OSError):
        os.listdir(path.parent)  # so that a network's file system looks again
    return path.exists()


def write_json(path: pathlib.Path, content: object) -> None:
    """Whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
