"""Batch k as a pure function of (seed, k), for any number of hosts and worker processes."""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Collection, Generator, Iterator
from multiprocessing import resource_tracker

import numpy as np

from mdt_jax.data.protocols import Plan, Source, Status
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log

ENDLESS = 2**62  # batches: epochs follow each other without end


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """A `Plan` of endless epochs; element n is batch `start` + n.

    Every epoch holds each of the `size` items once, in an order of its own; a batch may hold the
    end of one epoch and the start of the next. rows: which rows of each batch this host reads.
    Items and u do not depend on the number of hosts.
    """

    size: int
    seed: int
    batch_size: int
    rows: np.ndarray
    start: int = 0

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        k = self.start + n
        epochs, offsets = np.divmod(k * self.batch_size + self.rows, self.size)
        items = np.empty(len(self.rows), np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            items[inside] = _epoch_order(self.seed, epoch, self.size)[offsets[inside]]
        return items, np.random.default_rng([self.seed, k, 1]).random(self.batch_size)[self.rows]


@dataclasses.dataclass(frozen=True)
class _PlannedBatches:
    """The batches of a plan, read from a source; random access for Grain."""

    source: Source
    plan: Plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        items, u = self.plan[index]
        return {"items": items, **self.source.take(items, u)}


def batches(
    source: Source,
    plan: Plan,
    workers: int = 0,
    max_damaged: int = 0,
    known: Collection[int] = (),
) -> Generator[dict[str, np.ndarray], None, None]:
    """Read the batches of a plan in order and ahead: what `Source.take` returns, and "items" [n].

    workers: processes that read; 0: threads of this one. Each damaged item is named once on stderr.
    Raises UserError for an item that is UNREADABLE, and where more than max_damaged different items
    are damaged, including those `known` from before.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; their defaults are right
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(_PlannedBatches(source, plan))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))
    if workers:
        _kill_workers_soon()
        # No shared memory: containers have little, and a killed process would leave it filled.
        unshared = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, unshared)
        options = grain.MultiprocessingOptions(num_workers=workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
    iterator = iter(dataset)
    damage = _Damage(source, set(known), max_damaged)
    try:
        for batch in _with_user_errors(_start_workers(iterator) if workers else iterator):
            damage.check(batch)
            yield batch
    finally:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class _Damage:
    """The damaged items of a source up to now, of which at most max_damaged are allowed."""

    source: Source
    items: set[int]
    max_damaged: int

    def check(self, batch: dict[str, np.ndarray]) -> None:
        """Name the damaged items of a batch that are new. Raises UserError as `batches` does."""
        for n in np.flatnonzero(batch["status"]).tolist():
            item = int(batch["items"][n])
            if batch["status"][n] == Status.UNREADABLE:
                name, why = self.source.name(item), self.source.why(item)
                raise UserError(f"{name} cannot be read: {why}")
            if item not in self.items:
                self._add(item)

    def _add(self, item: int) -> None:
        self.items.add(item)
        name, why = self.source.name(item), self.source.why(item)
        log(f"{name} is left out: {why}")
        if len(self.items) > self.max_damaged:
            raise UserError(
                f"images that cannot be read: {len(self.items)}, the last {name}: {why}; "
                f"data.max_damaged is {self.max_damaged}"
            )


def _kill_workers_soon() -> None:
    """Make Grain kill a worker that does not end within 1 second instead of 25.

    A worker whose next batch does not fit its pipe never ends by itself once nobody reads the
    pipe. Grain has no public name for this time.
    """
    module = sys.modules.get("grain._src.python.dataset.transformations.process_prefetch")
    if hasattr(module, "_PROCESS_KILL_TIMEOUT_S"):
        vars(module)["_PROCESS_KILL_TIMEOUT_S"] = 1


def _start_workers(iterator: Iterator) -> Iterator:
    """The elements of an iterator whose processes start for the first one, with signals blocked.

    Only the main process answers signals; its workers inherit the block.
    """
    resource_tracker.ensure_running()  # starting it would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        first = list(itertools.islice(iterator, 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from iterator


def _end_with_parent(*_) -> None:
    """Let no worker outlive the main process."""

    def wait():
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _with_user_errors(iterator: Iterator) -> Iterator:
    """The elements of an iterator; UserError for failures of reading that no image causes."""
    try:
        yield from iterator
    except OSError as error:
        raise UserError(f"the data cannot be read: {error}") from None
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(
            "a process that reads data was killed, perhaps for lack of memory: lower data.workers"
        ) from None
