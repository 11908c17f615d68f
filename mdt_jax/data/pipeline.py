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
from typing import Protocol

import numpy as np

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log

ENDLESS = 2**62  # batches; epochs follow each other for as long as anybody asks
UNREADABLE = -2  # and below: item −2 − n could not be read, and nothing stands in for it


class Source(Protocol):
    """What a model is trained on: items by number from 0, each an image or latents with a label.

    Worker processes get a copy, so it can be pickled.
    """

    @property
    def classes(self) -> list[str]:
        """The names of the labels 0, 1, …; empty without labels."""
        ...

    @property
    def identity(self) -> str:
        """What tells it from other sets: a SHA-256, hexadecimal."""
        ...

    def __len__(self) -> int: ...

    def take(self, items: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """The items [n] int64; u: [n] float64 in [0, 1), for what is drawn for each one.

        Returns "labels" [n] int32, "damaged" [n] int64, and either "images" [n, H, W, C] uint8 or
        "mean" and "std" [n, h, w, c] float16. damaged: −1; or the item, where another or black
        stands in; or UNREADABLE − item, where nothing does. Raises OSError where it is not the
        items' fault.
        """
        ...

    def name(self, i: int) -> str:
        """Item i, for messages."""
        ...

    def why(self, i: int) -> str:
        """What is wrong with item i, for messages."""
        ...


class Plan(Protocol):
    """Which items stand in which batch, such as `Shuffled`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, n: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Batch n from 0: (items, u), as `Source.take` has them."""
        ...


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Element n: (items, u) of batch `start` + n, of which this host reads the places `rows`.

    items: int64, which of `size` stand there: every one once an epoch, each epoch reshuffled, and a
    batch may hold the end of one and the start of the next. u: float64 in [0, 1), for what is drawn
    for each item. Neither depends on how many hosts there are.
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
            here = epochs == epoch
            items[here] = _epoch_order(self.seed, epoch, self.size)[offsets[here]]
        return items, np.random.default_rng([self.seed, k, 1]).random(self.batch_size)[self.rows]


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What a source gives for each element of a plan; random access for Grain."""

    source: Source
    plan: Plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.source.take(*self.plan[index])


def batches(
    source: Source,
    plan: Plan,
    workers: int = 0,
    max_damaged: int = 0,
    known: Collection[int] = (),
) -> Generator[dict[str, np.ndarray], None, None]:
    """source.take(items, u) for each element (items, u) of a plan, in order, read ahead.

    workers: processes that read; 0: threads of this one. Damaged items are named on stderr once,
    and more than max_damaged different ones, those `known` before included, raise UserError; so
    does what nothing can stand in for.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, which have defaults
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(_Taken(source, plan))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))
    if workers:
        _kill_workers_soon()
        # No shared memory: containers have little, and what is killed would leave it filled.
        unshared = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, unshared)
        options = grain.MultiprocessingOptions(num_workers=workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_in_a_worker)
    known, iterator = set(known), iter(dataset)
    try:
        for batch in _explained(_started(iterator) if workers else iterator):
            for item in batch["damaged"].tolist():
                _look_at(source, item, known, max_damaged)
            yield batch
    finally:
        iterator.close()


def _kill_workers_soon() -> None:
    """Let Grain kill a worker that does not end within a second, not within 25.

    One whose next batch does not fit its pipe never ends, since nobody reads it any more. Grain
    has no public name for this time.
    """
    module = sys.modules.get("grain._src.python.dataset.transformations.process_prefetch")
    if hasattr(module, "_PROCESS_KILL_TIMEOUT_S"):
        vars(module)["_PROCESS_KILL_TIMEOUT_S"] = 1


def _started(iterator: Iterator) -> Iterator:
    """Its elements. Processes that start for the first inherit that signals are blocked.

    These are the main process's to answer.
    """
    resource_tracker.ensure_running()  # which unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        first = list(itertools.islice(iterator, 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from iterator


def _in_a_worker(*_) -> None:
    """No worker outlives the main process."""

    def follow():
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def _explained(iterator: Iterator) -> Iterator:
    """Its elements; UserError where reading fails through no fault of an image."""
    try:
        yield from iterator
    except OSError as error:
        raise UserError(f"the data cannot be read: {error}") from None
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(
            "a process that reads data was killed, perhaps for want of memory: lower data.workers"
        ) from None


def _look_at(source: Source, item: int, known: set[int], max_damaged: int) -> None:
    """Say that an item is left out, once; UserError where that is one too many."""
    if item <= UNREADABLE:
        item = UNREADABLE - item
        raise UserError(f"{source.name(item)} cannot be read: {source.why(item)}")
    if item < 0 or item in known:
        return
    known.add(item)
    why = source.why(item)
    log(f"{source.name(item)} is left out: {why}")
    if len(known) > max_damaged:
        raise UserError(
            f"images that cannot be read: {len(known)}, the last {source.name(item)}: {why}; "
            f"data.max_damaged is {max_damaged}"
        )
