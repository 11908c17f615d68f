"""Checkpoints: everything a run needs to go on, in one atomic Orbax step.

A step directory holds the items `params`, `ema`, `progress` (optimiser state and counters) and
`meta` (config, step and checksums as JSON). It gets its final name only when all of it is written.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mdt_jax import distributed
from mdt_jax.errors import UserError
from mdt_jax.files import check_room, free, passes, reason
from mdt_jax.train.state import TrainState

FOLDER = "checkpoints"
FORMAT = 1  # of a step folder; a newer one is not for this code
ORBAX_FILES = 1_000_000  # bytes that a step takes besides its arrays, generously
SUM = "sha256"  # in `meta`: of all else in it; so in every format, newer ones included
STEP = re.compile("0|[1-9][0-9]*")  # what a step's folder is called

# Files that Orbax itself leaves in a folder that it writes.
ORBAX_MARKS = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt"}

Read = TypeVar("Read")


def _items(state: TrainState) -> dict[str, object]:
    progress = {
        name: getattr(state, name) for name in ("step", "opt_state", "skipped", "skipped_in_row")
    }
    return {"params": state.params, "ema": state.ema, "progress": progress}


@jax.jit
def _checksum(tree) -> jax.Array:
    """A uint32 of all bits of a tree, on the devices where it lies; independent of the sharding."""
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total += jnp.uint32(2 * number + 1) * words.sum(dtype=jnp.uint32)
    return total


def _steps(directory: pathlib.Path) -> list[int]:
    """Finished steps, newest first: unfinished ones still have a temporary name."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir()]
    return sorted((int(name) for name in names if STEP.fullmatch(name)), reverse=True)


def steps_in(workdir: str | os.PathLike) -> list[int]:
    """The steps that a run has saved there, newest first."""
    return _steps(pathlib.Path(workdir) / FOLDER)


def _reader() -> ocp.Checkpointer:
    """Each process reads by itself: by default Orbax has those that could wait for those that could
    not, which have left already."""
    _quiet()
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)


def _restore(folder: pathlib.Path, items: dict[str, Any]) -> dict[str, Any]:
    """Restore items (abstract trees by name) of a step folder; ValueError if bits have changed."""
    args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    error = None
    try:
        with _reader() as checkpointer:
            restored = checkpointer.restore(
                folder, ocp.args.Composite(meta=ocp.args.JsonRestore(), **args)
            )
    except Exception as raised:  # whatever Orbax makes of a damaged folder
        error = raised
    # Where the files of one process are damaged, the others must not begin a sum with it.
    if not distributed.everyone(error is None, f"checkpoint {folder.name}"):
        raise error or ValueError("another process cannot read it")
    for name in items:
        if int(_checksum(restored[name])) != restored["meta"]["checksums"][name]:
            raise ValueError(f"the values of {name} are not those that were saved")
    return restored


def _digest(meta: dict) -> str:
    """SHA-256 of a meta, but for the one that it holds."""
    rest = {name: value for name, value in meta.items() if name != SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(folder: pathlib.Path) -> dict:
    """The JSON of a step folder: config, step, checksums and the times of the run.

    Raises ValueError where it is not what was saved, and UserError where a newer mdt_jax has
    written it in a way that this one does not know.
    """
    with _reader() as checkpointer:
        meta = checkpointer.restore(folder, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if SUM in meta and meta[SUM] != _digest(meta):  # older ones have none
        raise ValueError("its meta is not what was saved")
    of_run = folder.parent.name == FOLDER and STEP.fullmatch(folder.name)
    if of_run and int(folder.name) != meta["step"]:
        raise ValueError(f"its meta is of step {meta['step']}")
    if meta.get("format", 1) > FORMAT:
        raise UserError(
            f"checkpoint {folder} is of format {meta['format']}, newer than the {FORMAT} that this "
            "mdt_jax knows: install a newer one"
        )
    return meta


def check_readable(folder: pathlib.Path, error: Exception) -> None:
    """Raise UserError where a step folder may be sound and only cannot be read just now.

    error: what reading it raised. Orbax takes files that may not be opened for missing ones, so
    each of them is tried.
    """

    def fail(why: OSError):
        if passes(why):
            raise why

    try:
        for place, _, names in os.walk(folder, onerror=fail):
            for name in names:
                with open(os.path.join(place, name), "rb") as file:
                    while file.read(1 << 24):
                        pass
    except OSError as raised:
        error = raised
    if passes(error):
        raise UserError(
            f"checkpoint {folder} cannot be read just now: {reason(error)}; nothing was moved, the "
            "same command tries again"
        ) from None


def check_path(path: str | os.PathLike) -> None:
    """Raise UserError for a folder that Orbax could write but not read: it takes its path for a
    pattern of names.
    """
    full = str(pathlib.Path(path).absolute())
    found = [character for character in "*?[\\" if character in full]
    if found:
        raise UserError(
            f"{full} has {' and '.join(found)} in its path, and checkpoints in such a folder "
            "cannot be read back; choose another name, or rename the folder"
        )


def _newest_sound(
    directory: pathlib.Path, read: Callable[[pathlib.Path], Read]
) -> tuple[Read | None, list[int]]:
    """read(folder) of the newest step that can be read, and the damaged steps passed over.

    Returns (None, []) where there is no step at all; raises UserError where none can be read.
    """
    damaged = []
    for step in _steps(directory):
        try:
            return read(directory / str(step)), damaged
        except UserError:
            raise
        except Exception as error:  # whatever Orbax makes of a damaged folder
            check_readable(directory / str(step), error)
            damaged.append(step)
            print(
                f"checkpoint {directory / str(step)} is damaged: {reason(error)}", file=sys.stderr
            )
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {directory} can be read; restore "
            "one from a backup, or train anew in another workdir"
        )
    return None, damaged


def _quiet() -> None:
    """Orbax logs each save, leftovers of killed ones, and tracebacks of what is raised anyway."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _late_work_aside


def _late_work_aside(unraisable) -> None:
    """Reads and writes under way when another failed end after it, and each would say so."""
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in pathlib.Path(code.co_filename).parts
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class Checkpoints:
    """Saves a run's state in the background, and finds the newest sound one to go on from.

    keep: how many, those of the latest steps; None: all.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int | None = 1):
        _quiet()
        self.directory = pathlib.Path(workdir).absolute() / FOLDER
        self._keep = keep
        self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def restore(self, state: TrainState, check: Callable[[dict], None]):
        """(state, meta) of the newest sound step, or None where nothing was ever saved.

        state: the shapes and shardings to restore to. check(meta) may raise UserError before
        anything else is read. A damaged newer step is set aside in `damaged/`, and this is said.
        """

        def read(folder: pathlib.Path):
            meta = read_meta(folder)
            check(meta)
            return _restore(folder, _items(state))

        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; it should be the folder of checkpoints")
        items, damaged = _newest_sound(self.directory, read)
        if items is None:
            return None
        for step in damaged:
            # The folder of checkpoints may be a link to another disk.
            aside = self.directory.resolve().parent / "damaged" / f"{step}-{time.time_ns()}"
            if distributed.is_first():
                aside.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(aside)
            distributed.say(f"going on without step {step}, now in {aside}")
        state = TrainState(params=items["params"], ema=items["ema"], **items["progress"])
        return state, items["meta"]

    def save(self, state: TrainState, meta: dict) -> None:
        """Start to save; returns once the state is copied.

        Raises UserError where this or the save before cannot be written, such as on a full disk.
        """
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, create=True, cleanup_tmp_directories=True
            )  # fmt: skip
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = _items(state)
        checksums = {name: int(_checksum(tree)) for name, tree in items.items()}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        about = {"format": FORMAT, "step": step, "checksums": checksums, **meta}
        about[SUM] = _digest(about)
        manager, self._manager = self._manager, None  # nothing to wait for where this fails
        with _writing(self.directory, items):
            parts = ocp.args.Composite(meta=ocp.args.JsonSave(about), **args)
            manager.save(step, args=parts, force=True)
        self._manager = manager

    def replace(self, state: TrainState, meta: dict) -> None:
        """Save, wait until it is on disk, and remove all that was there before."""
        step = int(state.step)
        self.close()
        self._remove(lambda there: there == step)
        self.save(state, meta)
        self.close()
        self._remove(lambda there: there != step)

    def _remove(self, chosen: Callable[[int], bool]) -> None:
        if distributed.is_first():
            for step in filter(chosen, _steps(self.directory)):
                shutil.rmtree(self.directory / str(step))
        distributed.everyone(True)  # wait for it

    def metas(self) -> list[dict]:
        """The meta of each finished step that can be read, the newest first."""
        self.close()
        found = []
        for step in _steps(self.directory):
            folder = self.directory / str(step)
            try:
                found.append(read_meta(folder))
            except Exception as error:  # whatever Orbax makes of a damaged folder
                check_readable(folder, error)
        return found

    def newest(self) -> pathlib.Path | None:
        """The folder of the newest finished step, if any, once what was saved is on disk."""
        self.close()
        steps = _steps(self.directory)
        return self.directory / str(steps[0]) if steps else None

    def close(self) -> None:
        """Wait until what was saved is on disk. Raises UserError where it cannot be written."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with _writing(self.directory):
                manager.close()


@contextlib.contextmanager
def _writing(path: pathlib.Path, arrays: object = ()):
    """Raise UserError where there is no room for the arrays, or for whatever Orbax raises."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    check_room(path, size + ORBAX_FILES if size else 0)
    try:
        yield
    except Exception as error:
        if distributed.may_be_lost(error):
            raise
        raise UserError(f"{path} could not be written: {reason(error)}{free(path)}") from None


def load(path: str | os.PathLike, choose: Callable[[dict], tuple[str, dict]]) -> tuple[dict, dict]:
    """(arrays, meta) of one item of a workdir, its checkpoints folder, one step of it, or a folder
    of `save_folder`; of the newest step that is sound.

    choose: meta → (item, its shapes). Raises UserError when the path does not exist, holds no
    checkpoint or no such item, or none can be read.
    """
    root = pathlib.Path(path).absolute()
    if not str(path) or not os.path.exists(root):
        raise UserError(f"checkpoint '{path}' does not exist")
    if root.is_file():
        raise UserError(f"{path} is a file of no kind that holds weights, nor the folder of a run")
    check_path(root)

    def read(folder: pathlib.Path):
        meta = read_meta(folder)
        item, shapes = choose(meta)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
        )
        return _restore(folder, {item: abstract})[item], meta

    _check_is_ours(root)
    if is_saved(root):
        try:
            return read(root)
        except UserError:
            raise
        except Exception as error:
            check_readable(root, error)
            raise UserError(f"checkpoint {path} is damaged: {reason(error)}") from None
    found, _ = _newest_sound(root / FOLDER if (root / FOLDER).is_dir() else root, read)
    if found is None:
        raise UserError(f"{path} holds no checkpoint: expected a workdir that was trained in")
    return found


def _check_is_ours(root: pathlib.Path) -> None:
    """Raise UserError for a folder, or one with steps, that another program wrote by Orbax."""
    for folder in (root, *(root / str(step) for step in _steps(root))):
        names = {path.name for path in folder.iterdir()}
        if names & ORBAX_MARKS and not names & {"meta", "params", "ema", "progress"}:
            items = sorted(name for name in names if "." not in name and name not in ORBAX_MARKS)
            held = "arrays alone" if "_METADATA" in names else ", ".join(items[:3])
            raise UserError(
                f"{folder} is an Orbax checkpoint of another program: it holds {held}, not the "
                "params, ema, progress and meta of a run"
            )


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether a folder is one step of a run, or one of `save_folder`."""
    return (pathlib.Path(folder) / "meta").is_dir()


def save_folder(folder: str | os.PathLike, item: str, arrays: dict, meta: dict) -> None:
    """Write one item as a folder of its own, with its meta; whole or not at all.

    Raises UserError where it cannot be written, such as on a full disk.
    """
    _quiet()
    check_path(folder)
    folder = pathlib.Path(folder).absolute()
    checksums = {item: int(_checksum(arrays))}
    meta = {"format": FORMAT, "step": 0, "checksums": checksums, **meta}
    meta[SUM] = _digest(meta)
    args = {item: ocp.args.StandardSave(arrays), "meta": ocp.args.JsonSave(meta)}
    try:
        with _writing(folder, arrays), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            orbax.save(folder, ocp.args.Composite(**args))
    except UserError:
        _remove_unfinished(folder)
        raise


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Remove what a failed save of a folder has left, to which Orbax may still be writing."""
    for _ in range(50):
        left = list(folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"))
        if not left:
            return
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)
