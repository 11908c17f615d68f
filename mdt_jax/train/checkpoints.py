"""Checkpoints: everything a run needs to go on, in one atomic Orbax step.

A step directory holds the items `params`, `ema`, `progress` (optimiser state and counters) and
`meta` (config, step, times).
"""

import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from mdt_jax import distributed
from mdt_jax.errors import UserError
from mdt_jax.files import reason
from mdt_jax.progress import say
from mdt_jax.train.orbax_folders import (
    FOLDER,
    ORBAX_MARKS,
    STEP,
    check_path,
    check_readable,
    is_saved,
    quiet,
    read_meta,
    restore,
    sealed,
    writing,
)
from mdt_jax.train.state import TrainState

Read = TypeVar("Read")


def _items(state: TrainState) -> dict[str, object]:
    progress = {
        name: getattr(state, name) for name in ("step", "opt_state", "skipped", "skipped_in_row")
    }
    return {"params": state.params, "ema": state.ema, "progress": progress}


def _steps(directory: pathlib.Path) -> list[int]:
    """Finished steps, newest first: unfinished ones still have a temporary name."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir()]
    return sorted((int(name) for name in names if STEP.fullmatch(name)), reverse=True)


def steps_in(workdir: str | os.PathLike) -> list[int]:
    """The steps that a run has saved there, newest first."""
    return _steps(pathlib.Path(workdir) / FOLDER)


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
            say(f"checkpoint {directory / str(step)} is damaged: {reason(error)}")
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {directory} can be read; restore "
            "one from a backup, or train anew in another workdir"
        )
    return None, damaged


class Checkpoints:
    """Saves a run's state in the background, and finds the newest sound one to go on from.

    keep: how many, those of the latest steps; None: all.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int | None = 1):
        quiet()
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
            return restore(folder, _items(state))

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
        parts = sealed(items, {"step": step, **meta})
        manager, self._manager = self._manager, None  # nothing to wait for where this fails
        with writing(self.directory, items):
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
            with writing(self.directory):
                manager.close()


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
        return restore(folder, {item: abstract})[item], meta

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
        kinds = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
        # Files of several parts are not read.
        held = sorted(n for n in os.listdir(root) if n.endswith(kinds) and "-of-" not in n)
        hint = f"; for the weights in {held[0]} give this file" if held else ""
        raise UserError(f"{path} holds no checkpoint: expected a workdir that was trained in{hint}")
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
