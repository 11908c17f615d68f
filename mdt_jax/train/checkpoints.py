"""Checkpoints: everything a run needs to go on, in one atomic Orbax step.

A step directory holds the items `params`, `ema`, `progress` (optimiser state and counters) and
`meta` (config, step, times).
"""

import os
import pathlib
import shutil
import time
from collections.abc import Callable

import orbax.checkpoint as ocp

from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.train.state import TrainState
from mdt_jax.weights.orbax_folders import (
    FOLDER,
    check_readable,
    newest_sound,
    quiet,
    read_meta,
    restore,
    sealed,
    steps_of,
    writing,
)


def _items(state: TrainState) -> dict[str, object]:
    progress = {
        name: getattr(state, name) for name in ("step", "opt_state", "skipped", "skipped_in_row")
    }
    return {"params": state.params, "ema": state.ema, "progress": progress}


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
        items, damaged = newest_sound(self.directory, read)
        if items is None:
            return None
        for step in damaged:
            # The folder of checkpoints may be a link to another disk.
            aside = self.directory.resolve().parent / "damaged" / f"{step}-{time.time_ns()}"
            if hosts.is_first():
                aside.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(aside)
            hosts.log0(f"going on without step {step}, now in {aside}")
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
        if hosts.is_first():
            for step in filter(chosen, steps_of(self.directory)):
                shutil.rmtree(self.directory / str(step))
        hosts.all_hosts(True)  # wait for it

    def metas(self) -> list[dict]:
        """The meta of each finished step that can be read, the newest first."""
        self.close()
        found = []
        for step in steps_of(self.directory):
            folder = self.directory / str(step)
            try:
                found.append(read_meta(folder))
            except Exception as error:  # whatever Orbax makes of a damaged folder
                check_readable(folder, error)
        return found

    def newest(self) -> pathlib.Path | None:
        """The folder of the newest finished step, if any, once what was saved is on disk."""
        self.close()
        steps = steps_of(self.directory)
        return self.directory / str(steps[0]) if steps else None

    def close(self) -> None:
        """Wait until what was saved is on disk. Raises UserError where it cannot be written."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with writing(self.directory):
                manager.close()
