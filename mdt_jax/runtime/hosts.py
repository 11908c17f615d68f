"""The processes of a run, on JAX's distributed runtime: start, agree, notice deaths, stop.

With one process all of this does nothing.
"""

import contextlib
import itertools
import os
import pathlib
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state as _state  # its only home, as Orbax and Flax have it
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mdt_jax.runtime import locks, parallel, progress, roll_call, signing
from mdt_jax.runtime.errors import UserError

_left = threading.Event()  # the processes have parted in peace
LEFT = "mdt_jax/left"
LONGEST_WAIT = 3600  # seconds in which all processes must come to a point where they agree
_guards: list[threading.Thread] = []
_patience = 60  # seconds
_calls = itertools.count()
GO_ON = "this process stops, too. The same command goes on from the last checkpoint"


def start(how: str, num_processes: int, process_id: int, timeout: int, patience: int) -> None:
    """Bring the processes of a run together, before anything else is asked of JAX.

    how: "off"; "auto", where Cloud TPU, Slurm, Kubernetes or Open MPI say who there is, and one
    process if none does; or HOST:PORT of process 0, with num_processes and process_id.
    timeout: seconds in which all must have come, and again to find the devices and sum over them.
    patience: seconds after which a process that does not answer is taken for dead; the others stop.
    Raises UserError, or ends the process with one line, where they do not come together.
    """
    global _patience
    _patience = patience
    if timeout < 1 or patience < 5:
        raise UserError(
            f"--start_timeout={timeout} must be at least 1, --patience={patience} at least 5"
        )
    if how in ("off", "auto") and (num_processes or process_id != -1):
        raise UserError(
            f"--num_processes and --process_id need --distributed=HOST:PORT; it is {how}"
        )
    if how == "off":
        return
    given: dict[str, Any] = {}
    if how != "auto":
        if not re.fullmatch(r".+:[0-9]+", how):
            raise UserError(f"--distributed={how} is none of auto, off, HOST:PORT of process 0")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--distributed={how} needs --num_processes and a --process_id below it; they are "
                f"{num_processes} and {process_id}"
            )
        given = dict(
            coordinator_address=how, num_processes=num_processes, process_id=process_id,
            cluster_detection_method="deactivate",
            coordinator_bind_address=roll_call.bind_address(how),
        )  # fmt: skip
    arrived = threading.Event()
    threading.Thread(target=_roll_call, args=(timeout, arrived), daemon=True).start()
    try:
        # JAX's own end of a start is an abort that names nobody; the roll call comes before it.
        jax.distributed.initialize(
            **given, initialization_timeout=timeout + 60, heartbeat_timeout_seconds=patience + 30
        )
    except Exception as error:
        # Nobody says that there are others; or a notebook has asked JAX for its devices before.
        alone = "coordinator_address should be defined|must be called before any JAX calls"
        if not given and re.search(alone, str(error)) and not _unheard_kubernetes():
            return
        hint = ' (pip install -e ".[k8s]")' if _unheard_kubernetes() else ""
        raise UserError(
            f"the processes cannot be brought together: {' '.join(str(error).split())}{hint}; with "
            "--distributed=off this one trains alone"
        ) from None
    finally:
        arrived.set()
    if several():
        _meet(timeout)
    else:
        log0(f"process 0 on {_devices()}")


def _unheard_kubernetes() -> bool:
    """Whether this is a pod of an Indexed Job, but JAX lacks the package to see it."""
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(os.environ)


def several() -> bool:
    """Whether this is one of several processes."""
    return _state.client is not None and _state.num_processes > 1


def is_first() -> bool:
    """Whether this is the process that prints and writes for all."""
    return _state.process_id == 0


def name() -> str:
    """ "process 2: ", to begin a line with."""
    return f"process {_state.process_id}: "


def log0(line: str) -> None:
    """`progress.say`, once for all processes."""
    if is_first():
        progress.log(line)


def _roll_call(timeout: float, arrived: threading.Event) -> None:
    """While JAX waits for all processes: who is there? At the end of the time say who is not."""
    end = time.monotonic() + timeout
    while _state.client is None or _state.coordinator_address is None:
        if arrived.wait(0.05):
            return
        if time.monotonic() > end:
            _die(f"nobody said within {timeout:.0f} s which processes there are")
    left = end - time.monotonic()
    line = roll_call.hold(
        _state.coordinator_address, _state.process_id, _state.num_processes, left, arrived
    )
    if line is not None:
        _die(line)


def _meet(timeout: int) -> None:
    """Watch over each other from now on, print who is there, and try a sum over all devices."""
    for guard in (_watch, _listen):
        _guards.append(threading.Thread(target=guard, daemon=True))
        _guards[-1].start()
    late = threading.Timer(timeout, _die, [
        f"the devices of all processes did not come to a sum within {timeout} s, though the "
        "processes answer: is the network between them open to each other?"
    ])  # fmt: skip
    late.daemon = True
    late.start()
    for process, text in enumerate(_exchange("host", _devices())):
        log0(f"process {process} on {text}")
    mesh = parallel.make_mesh()
    ones = parallel.put(np.ones(mesh.size), parallel.split_batch(mesh))
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    total = int(add(ones))
    late.cancel()
    if total != mesh.size:
        raise UserError(f"a sum over {mesh.size} devices that are 1 each came out as {total}")


def _devices() -> str:
    """This host and its devices. Raises UserError where JAX finds none."""
    try:
        devices = jax.local_devices()
    except Exception as error:
        raise UserError(f"JAX finds no devices: {' '.join(str(error).split())[:300]}") from None
    ids = ", ".join(str(device.id) for device in devices)
    return f"{socket.gethostname()}: {len(devices)} × {devices[0].device_kind} ({ids})"


def _client() -> Any:
    """Where processes leave values for each other; there is one where there are several."""
    return _state.client


def _leave_signed(key: str, text: str) -> None:
    """Leave a text for the others. Raises UserError where somebody else has set the key."""
    try:
        _client().key_value_set_bytes(key, signing.sign(key, text))
    except Exception as error:
        if "ALREADY_EXISTS" in str(error):
            raise UserError(_not_ours(key)) from None
        raise


def _read_signed(key: str, seconds: int) -> str:
    """What a process of this run has left there. Raises UserError where it was somebody else."""
    text = signing.signed_text(key, _client().blocking_key_value_get_bytes(key, seconds * 1000))
    if text is None:
        raise UserError(_not_ours(key))
    return text


def _not_ours(key: str) -> str:
    return (
        f"the key {key} at the coordinator {_state.coordinator_address} was set by somebody who is "
        f"not of this run: all its processes need the same {signing.TOKEN}, and its ports belong "
        "on a private network"
    )


def _exchange(what: str, value: str) -> list[str]:
    """Every process's value, in order.

    Raises UserError where others are about something else, do not come within LONGEST_WAIT, or are
    not of this run. Of one that is gone the watch says so, and ends this process meanwhile.
    """
    place, count = f"mdt_jax/exchange/{next(_calls)}", _state.num_processes
    try:
        _leave_signed(f"{place}/{_state.process_id}", f"{what}\n{value}")
        _client().wait_at_barrier(place, LONGEST_WAIT * 1000)
        found = [_read_signed(f"{place}/{process}", 60) for process in range(count)]
    except Exception as error:
        if not may_be_lost(error):
            raise
        await_verdict(error)
        said = " ".join(str(error).split())[:200]
        raise UserError(f"the processes did not come together for '{what}': {said}") from None
    for process, text in enumerate(found):
        if not text.startswith(f"{what}\n"):
            other = text.partition("\n")[0]
            raise UserError(f"the processes differ: process {process} is at {other}, not {what}")
    return [text.partition("\n")[2] for text in found]


def agree(values: Mapping[str, object], hint: str = "") -> None:
    """Raise UserError, in every process, where some have other values than process 0."""
    if not several():
        return
    lines = [f"{name}={value}" for name, value in values.items()]
    all_lines = [text.split("\n") for text in _exchange("agree", "\n".join(lines))]
    for process, theirs in enumerate(all_lines):
        for first, other in zip(all_lines[0], theirs, strict=False):
            if first != other:
                raise UserError(
                    f"the processes differ: process 0 has {first}, process {process} {other}{hint}"
                )


def all_hosts(yes: bool, what: str = "vote") -> bool:
    """Whether `yes` is so in every process; all of them must ask, and about the same."""
    return all(answer == "1" for answer in _exchange(what, str(int(yes)))) if several() else yes


def broadcast(value: str) -> str:
    """Process 0's value, in every process; all of them must ask."""
    return _exchange("of_first", value)[0] if several() else value


@contextlib.contextmanager
def alone(lock: pathlib.Path, what: str) -> Iterator[None]:
    """`locks.held`, by the first process for all of them; each one raises where it is refused."""
    with contextlib.ExitStack() as stack:
        refused = ""
        if is_first():
            try:
                stack.enter_context(locks.held(lock, what))
            except UserError as error:
                refused = str(error)
        if refused := broadcast(refused):
            raise UserError(refused)
        yield


def fetch(array: jax.Array) -> np.ndarray:
    """All of an array, in every process, once the slowest has it; all of them must ask."""
    array.block_until_ready()
    if array.is_fully_addressable:
        return np.asarray(array)
    all_hosts(True)
    return multihost_utils.process_allgather(array, tiled=True)


def _watch() -> None:
    """End this process, with a line that says why, once another one does not answer any more."""
    while not _left.is_set():
        try:
            _client().wait_at_barrier("mdt_jax/alive", _patience * 1000)
        except Exception as error:
            if not _left.is_set():
                _die(_who_is_gone(error))
        _left.wait(_patience / 12)


def _who_is_gone(error: Exception) -> str:
    named = str(error).partition("task names:")[2].partition("RPC:")[0]
    gone = [int(number) for number in re.findall(r"^\s*(\d+)\s*$", named, re.M)]
    said = " ".join(str(error).split())[:200]
    who = roll_call.names(gone) if gone else f"another process ({said})"
    return f"{who} did not answer for {_patience} s; {GO_ON}"


def _listen() -> None:
    """End this process once another says that it leaves, or the coordinator is gone."""
    while not _left.is_set():
        try:
            said = _read_signed(LEFT, LONGEST_WAIT)
        except UserError as error:
            said = f"2 {error}"
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            said = f"2 process 0, the coordinator, is gone; {GO_ON}"
        if not _left.is_set():
            code, _, line = said.partition(" ")
            _die(line, int(code))


def _die(line: str, code: int = 2) -> None:
    """End this process at once: what JAX does at exit would wait for processes that are gone."""
    progress.log(f"{'error: ' * bool(code)}process {_state.process_id}: {line}")
    leave_at_once(code)


def leave_at_once(code: int, reason: str = "") -> None:
    """End this process without the others, who hear the reason and end as well."""
    _left.set()
    if reason:
        with contextlib.suppress(Exception):  # perhaps somebody left before
            line = f"{code} process {_state.process_id} stopped: {reason}"
            _leave_signed(LEFT, line)
    if several() and is_first():
        time.sleep(3)  # with the coordinator gone, JAX aborts the others in the midst of leaving
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # full, or closed
            stream.flush()
    os._exit(code)


def may_be_lost(error: Exception) -> bool:
    """Whether it may be that another process is gone."""
    return several() and bool(re.match(r"[A-Z_]+: ", str(error)))  # as XLA's errors begin


def await_verdict(error: Exception) -> None:
    """After an error that a lost process may have caused: wait until the watch says which."""
    if may_be_lost(error):
        progress.log(
            f"process {_state.process_id}: {' '.join(str(error).split())[:200]}; looking who is "
            "gone …"
        )
        time.sleep(_patience * 1.5)


def shutdown() -> None:
    """At the end of a run: wait for all, so that no one is missed."""
    if several():
        _exchange("part", "")
        _left.set()
        jax.distributed.shutdown()
        for guard in _guards:  # Python must not end under a thread that still waits for an answer
            guard.join(timeout=10)
        if any(guard.is_alive() for guard in _guards):
            leave_at_once(0)
