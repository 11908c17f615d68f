"""The folder of a run, on a disk or in a bucket: checks, and the files beside the checkpoints."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from mdt_jax import __version__
from mdt_jax import config as configs
from mdt_jax.data import sample_notes
from mdt_jax.runtime import buckets, files, hosts
from mdt_jax.runtime.errors import DamagedError, UserError
from mdt_jax.runtime.files import Path, atomic_write, read_json
from mdt_jax.train import inputs
from mdt_jax.train.log import read_steps
from mdt_jax.weights.step_folders import FOLDER, check_arrays_possible, check_path, steps_in

LOCK = ".lock"
# Folders that a run writes to. They may be links, or belong to another user.
WRITTEN = (
    FOLDER, "best", f"best/{FOLDER}", "samples", "damaged", "tensorboard", "wandb", "profile",
)  # fmt: skip


def check_same_run(meta: dict, config: ConfigDict, workdir: Path, identity: dict) -> None:
    """Check that a checkpoint can be resumed with a config and data, and print what has changed.

    meta: the checkpoint's. identity: as of `Inputs.identity`. Raises UserError where the checkpoint
    is of another network or optimiser, of other classes or files, or beyond the last step.
    """
    if meta["step"] > config.train.steps:
        raise UserError(
            f"{workdir} is trained to step {meta['step']} already, and train.steps is "
            f"{config.train.steps}; set it to {meta['step']} or more, or choose another workdir"
        )
    identity_before = {**identity, **meta}  # older checkpoints lack some of it
    before, now = identity_before["classes"], identity["classes"]
    if before != now:
        raise UserError(
            f"{workdir} was trained with the classes {inputs.describe_classes(before)}; "
            f"the data now has {inputs.describe_classes(now)}"
        )
    changes = _changes(configs.complete(meta["config"]), config)
    fixed = (
        "model.", "data.image_", "data.channels", "vae.", "diffusion.steps",
        "diffusion.objective", "optim.name",
    )  # fmt: skip
    other = [f"{name} is {old}, not {new}" for name, old, new in changes if name.startswith(fixed)]
    if other:
        raise UserError(
            f"{workdir} holds a checkpoint of another model or optimiser ({'; '.join(other)}); "
            "choose another workdir or the same config"
        )
    changed = {name for name, _, _ in changes}
    for name, digest in identity["files_sha256"].items():
        old_digest = identity_before["files_sha256"].get(name, digest)
        group, _, field = name.partition(".")
        path = config[group][field]
        if old_digest != digest and path and name not in changed:
            raise UserError(
                f"{name} {path} has changed since {workdir} was trained with it: its SHA-256 was "
                f"{old_digest[:12]} and is {digest[:12]}; restore the file, or choose another "
                "workdir"
            )
    if identity_before["images_sha256"] != identity["images_sha256"]:
        hosts.log0("resuming with another list of images than before")
    for name, old, new in changes:
        hosts.log0(f"resuming with {name} changed from {old} to {new}")


def _changes(before: ConfigDict, after: ConfigDict) -> list[tuple[str, object, object]]:
    """(field, old value, new value) of each field that differs."""
    return [
        (f"{group}.{name}", before[group].get(name), value)
        for group, fields in after.items()
        for name, value in fields.items()
        if before[group].get(name) != value
    ]


def check_nothing_is_lost(workdir: Path) -> None:
    """Raise UserError where a run has metrics of many steps but no checkpoint any more."""
    steps = [step for step, _ in read_steps(workdir / "metrics.jsonl")]
    if not steps:
        return
    # The second save waits for the first one, so that two intervals imply a finished checkpoint.
    try:
        every = int(_stored(workdir / "config.json")["train"]["checkpoint_every"])
    except (LookupError, TypeError, ValueError):
        every = 1
    if files.exists(workdir / "report.json") or steps[-1] > 2 * every:
        raise UserError(
            f"{workdir} holds the metrics of {steps[-1]} steps but no checkpoint; restore its "
            "checkpoints, or train in another workdir"
        )
    hosts.log0(f"{workdir} was stopped after {steps[-1]} steps, before a checkpoint")


def agree_on_config(config: ConfigDict) -> None:
    """Raise UserError where the processes of a run have different configs or code."""
    fields = {f"{g}.{n}": v for g, names in config.to_dict().items() for n, v in names.items()}
    hosts.agree({"mdt_jax": __version__, "jax": jax.__version__} | fields)


def agree_on_start(workdir: Path, identity: dict) -> None:
    """Raise UserError where the processes of a run see different data or different workdirs."""
    data = {"list of images": identity["images_sha256"], "classes": identity["classes"]}
    hosts.agree(data | identity["files_sha256"], "; all must read the same data")
    contents = {"checkpoints": steps_in(workdir), "a report": files.exists(workdir / "report.json")}
    hosts.agree(contents, f": {workdir} must be one folder for all")


def begin(workdir: Path, config: ConfigDict, classes: list[str], start: int) -> None:
    """Write config.json and classes.json, and remove results that the run makes anew.

    Only the first process calls it.
    """
    files.remove(workdir / "report.json")
    if start < config.train.steps:  # the samples belong to the same step as the report
        for name in ("samples.npz", "samples.png"):
            files.remove(workdir / name)
    write_json(workdir / "config.json", config.to_dict())
    if classes:
        write_json(workdir / "classes.json", classes)
        hosts.log0(f"classes: {inputs.describe_classes(classes)}")


def is_reported(workdir: Path, config: ConfigDict, step: int) -> bool:
    """Whether report.json belongs to this config and step, and its samples are complete."""
    report, stored = _stored(workdir / "report.json"), _stored(workdir / "config.json")
    try:
        same = configs.complete(stored).to_dict() == config.to_dict()
    except (AttributeError, LookupError, TypeError, ValueError):  # an edited file
        return False
    if not (stored and same and report.get("steps") == step):
        return False
    if not (config.sample.num_samples and hosts.is_first()):
        return True
    return files.exists(workdir / "samples.png") and sample_notes.is_whole(workdir / "samples.npz")


def _stored(path: Path) -> dict:
    """The contents of a JSON file of the run; {} where it is missing or damaged."""
    try:
        return read_json(path) or {}
    except DamagedError as error:
        hosts.log0(f"{error}; it is replaced")
        return {}


def measured_steps(workdir: Path, metrics: Sequence[str], last: int) -> set[int]:
    """The steps up to `last` for which metrics.jsonl has one of the metrics of samples."""
    steps = []
    if hosts.is_first():
        for step, line in read_steps(workdir / "metrics.jsonl"):
            if step <= last and not set(metrics).isdisjoint(json.loads(line)):
                steps.append(step)
    return set(hosts.broadcast(steps))


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[Callable[[], None]]:
    """Lock an existing workdir. Raises UserError where another run works in it.

    Yields a function that raises UserError where the lock is lost; see `locks.held`.
    """
    with hosts.alone(workdir / LOCK, f"workdir {workdir}") as check:
        yield check


def check_usable(workdir: Path) -> None:
    """Raise UserError where a run cannot work in a workdir, which need not exist.

    Either another run works there, or this process cannot write to it or to one of its folders:
    every process writes checkpoints.
    """
    check_path(workdir)
    check_arrays_possible(workdir)
    if files.in_bucket(workdir):
        files.check_writable(workdir, f"workdir {workdir}")
        buckets.check_deletable(workdir, f"workdir {workdir}")
        if files.is_file(workdir):
            raise UserError(f"workdir {workdir} is an object; choose another name")
        names = [name for name in files.names_in(workdir) if name != LOCK]
        if names and not {"config.json", FOLDER} & {*names}:
            raise UserError(
                f"workdir {workdir} holds something else than a run ({names[0]}); choose another "
                "name"
            )
    if hosts.broadcast(files.exists(workdir / LOCK)):
        with alone(workdir):
            pass
    if files.in_bucket(workdir):
        return
    for name in ("", *WRITTEN):
        if not name or os.path.lexists(workdir / name):
            files.check_writable(workdir / name, f"workdir {workdir / name}")


def make(workdir: Path) -> None:
    """Create a workdir. Raises UserError where it cannot be written, or processes see another."""
    if files.in_bucket(workdir):  # which needs no folders
        hosts.agree({"--workdir": workdir})
        return
    probe = workdir / ".write-test"
    try:
        if hosts.is_first():
            files.make_folder(workdir)
            probe.touch()
        hosts.all_hosts(True)  # wait for the first process
        if not _is_visible(probe):
            raise UserError(
                f"workdir {workdir} is not one folder for all processes: this one does not see the "
                "files of process 0"
            )
        hosts.all_hosts(True)
        if hosts.is_first():
            files.remove(probe)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written to: {files.reason(error)}") from None


def _is_visible(path: Path) -> bool:
    with contextlib.suppress(OSError):
        files.names_in(path.parent)  # makes a network file system refresh
    return files.exists(path)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
