"""Checkpoints: the whole state of a run, in one atomic Orbax step each.

A step folder holds the items `params`, `ema`, `progress` (optimiser state and counters) and `meta`
(config, step, times and hashes).
"""

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mdt_jax import config as configs
from mdt_jax.runtime import buckets, hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, absolute, in_bucket, is_file
from mdt_jax.train.state import TrainState
from mdt_jax.weights.orbax_folders import (
    check_readable,
    newest_sound,
    quiet,
    read_meta,
    restore,
    sealed,
    writing,
)
from mdt_jax.weights.step_folders import COMMIT, DAMAGED, FOLDER, steps_of, unfinished_steps


def _items(state: TrainState) -> dict[str, object]:
    progress = {
        name: getattr(state, name) for name in ("step", "opt_state", "skipped", "skipped_in_row")
    }
    return {"params": state.params, "ema": state.ema, "progress": progress}


class Checkpoints:
    """Saves the state of a run in the background, and restores the newest sound one.

    keep: how many of the latest steps remain. ranking: Orbax's `best_fn` and `best_mode`, after
    which the best steps remain instead.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 1, **ranking):
        quiet()
        self.directory = absolute(workdir) / FOLDER
        self._bucket = in_bucket(self.directory)
        # In a bucket Orbax would also remove the steps that are marked as damaged.
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=not self._bucket, **ranking
        )
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def restore(
        self, state: TrainState, check: Callable[[dict], None]
    ) -> tuple[TrainState, dict] | None:
        """(state, meta) of the newest sound step, or None where no step was ever saved.

        state: the shapes and shardings to restore to. check(meta) may raise UserError before any
        array is read. Damaged newer steps are moved to `damaged/`, in a bucket marked with DAMAGED,
        with a line for each.
        """

        def read(folder: Path):
            meta = read_meta(folder)
            check(meta)
            return restore(folder, _items(state))

        if is_file(self.directory):
            raise UserError(f"{self.directory} is a file; it must be the folder of checkpoints")
        items, damaged = newest_sound(self.directory, read)
        if items is None:
            return None
        for step in damaged:
            self._set_aside(step)
        state = TrainState(params=items["params"], ema=items["ema"], **items["progress"])
        return state, items["meta"]

    def _set_aside(self, step: int) -> None:
        """Move a damaged step to `damaged/`, or mark it in a bucket; nothing is deleted."""
        if self._bucket:
            folder = self.directory / str(step)
            if hosts.is_first():
                (folder / DAMAGED).write_text(
                    "mdt_jax could not read what Orbax had committed here\n"
                )
                buckets.remove(folder / COMMIT)
            hosts.log0(
                f"going on without the damaged step {step}, now marked in {folder / DAMAGED}"
            )
            return
        # The folder of checkpoints may be a link to another disk.
        aside = self.directory.resolve().parent / "damaged" / f"{step}-{time.time_ns()}"
        if hosts.is_first():
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
        hosts.log0(f"going on without the damaged step {step}, now in {aside}")

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            if self._bucket:
                self._remove_unfinished()
            self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        return self._manager

    def _remove_unfinished(self) -> None:
        """Remove the steps in a bucket that a process which ended has not finished."""
        if hosts.is_first():
            for step in unfinished_steps(self.directory):
                buckets.remove_folder(self.directory / str(step))
                hosts.log0(f"removed the unfinished step {step} of {self.directory}")
        hosts.all_hosts(True)  # wait for it

    def save(self, state: TrainState, meta: dict, metrics: dict | None = None) -> None:
        """Start to save a state, unless its step is saved. Returns once the state is copied.

        metrics: what Orbax ranks the step by. Raises UserError where this save or the one before
        fails, for example on a full disk.
        """
        manager, step = self._open(), int(state.step)
        if step in manager.all_steps():
            return
        if self._bucket and hosts.is_first():
            buckets.remove_folder(self.directory / str(step))  # of a damaged step
        items = _items(state)
        contents = sealed(items, {"step": step, **meta})
        self._manager = None  # if the save fails, there is nothing to wait for
        with writing(self.directory, items):
            manager.save(step, args=contents, metrics=metrics, force=True)
        self._manager = manager

    def are_whole(self) -> bool:
        """Whether no save is going on."""
        return self._manager is None or not self._manager.is_saving_in_progress()

    def newest(self) -> Path | None:
        """The folder of the newest finished step, if any, after every save has finished."""
        self.close()
        steps = steps_of(self.directory)
        return self.directory / str(steps[0]) if steps else None

    def close(self) -> None:
        """Wait until every save is on disk. Raises UserError where one failed."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with writing(self.directory):
                manager.close()


class BestCheckpoint(Checkpoints):
    """The state with the least measure of its samples, as Orbax ranks them.

    A step that was measured with other settings is no rival, nor is a damaged one.
    """

    def __init__(self, workdir: str | os.PathLike, config: ConfigDict):
        self._settings = _measurement(config)
        super().__init__(workdir, best_fn=self._rank, best_mode="min")

    def _rank(self, metrics: Any) -> float:
        # A checkpoint of an older version lacks the fields that came later.
        settings = _measurement(configs.default()) | metrics["settings"]
        return metrics["value"] if settings == self._settings else math.inf

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            for step in steps_of(self.directory):
                folder = self.directory / str(step)
                try:
                    read_meta(folder)
                    for file in folder.glob("metrics/metrics"):
                        json.loads(file.read_bytes())
                except Exception as error:  # whatever Orbax makes of a damaged folder
                    check_readable(folder, error)
                    self._set_aside(step)
            hosts.all_hosts(True)  # wait for it
        return super()._open()

    def offer(self, state: TrainState, meta: dict, value: float) -> bool:
        """Save a state whose samples measure `value`, unless an earlier one is as good.

        Returns whether it was saved; then it is on disk, and the earlier one is deleted.
        """
        manager, step = self._open(), int(state.step)
        best = manager.best_step()
        least = math.inf if best is None else self._rank(manager.metrics(best))
        if not value < least:  # also NaN
            return False
        if step in manager.all_steps():  # measured before, with other settings
            manager.delete(step)
        self.save(state, meta, {"value": value, "settings": self._settings})
        self.close()
        return True


def _measurement(config: ConfigDict) -> dict:
    """The config fields that a measure of samples depends on."""
    unrelated = {"evaluation": ("every",), "sample": ("num_samples", "batch_size")}
    return {
        f"{group}.{field}": value
        for group, others in unrelated.items()
        for field, value in config[group].items()
        if field not in others
    }
