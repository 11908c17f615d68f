"""The processes of a run: which one is the first, and what they agree on.

All processes must call the functions that wait for the others. With one process these functions
return at once.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mdt_jax.runtime import locks, progress
from mdt_jax.runtime.coordination import connection
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, reason

LONGEST_WAIT = 3600  # seconds in which all processes must reach an exchange


def several() -> bool:
    """Whether the run has several processes."""
    return connection.service.client is not None and connection.service.num_processes > 1


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return connection.service.process_id == 0


def name() -> str:
    """ "process 2", the subject of a message."""
    return f"process {connection.service.process_id}"


def log0(line: str) -> None:
    """Print a line to stderr as `progress.log` does, in process 0 only."""
    if is_first():
        progress.log(line)


def exchange(topic: str, value: Any) -> list[Any]:
    """Every process's value, in the order of the processes; values are JSON.

    topic: the subject, equal in all processes. Raises UserError if the topics differ, if a process
    does not reach the exchange within LONGEST_WAIT seconds, or if another run set a key. If a
    process died, `cluster` ends this one meanwhile.
    """
    service = connection.service
    key = f"mdt_jax/exchange/{next(connection.exchanges)}"
    try:
        connection.put(f"{key}/{service.process_id}", json.dumps([topic, value]))
        service.client.wait_at_barrier(key, LONGEST_WAIT * 1000)
        texts = [connection.get(f"{key}/{number}", 60) for number in range(service.num_processes)]
    except Exception as error:
        if not may_be_lost(error):
            raise
        await_verdict(error)
        raise UserError(f"the processes could not exchange '{topic}': {reason(error)}") from None
    topics, values = zip(*map(json.loads, texts), strict=True)
    for process, other in enumerate(topics):
        if other != topic:
            raise UserError(f"the processes differ: process {process} is at {other}, not {topic}")
    return list(values)


def agree(values: Mapping[str, object], hint: str = "") -> None:
    """Raise UserError, in every process, if any process's values differ from those of process 0."""
    if not several():
        return
    lines = exchange("agree", [f"{field}={value}" for field, value in values.items()])
    for process, others in enumerate(lines):
        for expected, got in zip(lines[0], others, strict=False):
            if expected != got:
                raise UserError(
                    f"the processes differ: process 0 has {expected}, process {process} {got}{hint}"
                )


def all_hosts(condition: bool, topic: str = "vote") -> bool:
    """Whether the condition holds in every process."""
    return all(exchange(topic, bool(condition))) if several() else condition


def broadcast(value: Any) -> Any:
    """Process 0's value, which must be JSON, in every process."""
    return exchange("broadcast", value)[0] if several() else value


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[Callable[[], None]]:
    """`locks.held` for all processes, by process 0. Raises UserError in each if it is refused."""
    with contextlib.ExitStack() as stack:
        refusal, check = "", lambda: None
        if is_first():
            try:
                check = stack.enter_context(locks.held(lock, what))
            except UserError as error:
                refusal = str(error)
        if refusal := broadcast(refusal):
            raise UserError(refusal)
        yield check


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array, in every process, once the slowest process has computed it."""
    array.block_until_ready()
    if array.is_fully_addressable:
        return np.asarray(array)
    all_hosts(True)
    return multihost_utils.process_allgather(array, tiled=True)


def may_be_lost(error: Exception) -> bool:
    """Whether the death of another process may have caused an error."""
    return several() and bool(re.match(r"[A-Z_]+: ", str(error)))  # as XLA's errors begin


def await_verdict(error: Exception) -> None:
    """If another process may have died, wait: `cluster` then ends this process and names it."""
    if may_be_lost(error):
        progress.log(f"{name()}: {reason(error)}; looking for a process that died …")
        time.sleep(connection.patience * 1.5)
