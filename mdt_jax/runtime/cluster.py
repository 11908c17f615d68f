"""Start and end of the processes of a run, on JAX's distributed runtime.

From the start on, each process watches the others and ends when one of them died or left.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from mdt_jax.runtime import hosts, parallel, progress, rendezvous
from mdt_jax.runtime.coordination import connection
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason

LEFT = "mdt_jax/left"  # the key under which a process says why it ends
LONGEST_REST = 24 * 3600  # seconds that a process waits at the end for the others' parts
RESUME = "this process stops, too; rerun the same command to resume from the last checkpoint"


def start(
    distributed: str, num_processes: int, process_id: int, start_timeout: int, patience: int
) -> None:
    """Connect the processes of a run, before JAX starts its devices.

    The parameters have the values of the flags with these names. distributed: "off"; HOST:PORT of
    process 0, with num_processes and process_id; or "auto", which asks the environment of Cloud
    TPU, Slurm, Kubernetes or Open MPI, and means one process without any. start_timeout: seconds
    for all processes to connect, and again for a first sum over their devices. patience: seconds
    after which a process that does not answer counts as dead and the others stop.

    Unless SIGTERM is handled already, it ends the process, and the others with it, with exit code
    143.

    Raises UserError, or ends the process with one line, if the processes do not connect.
    """
    if start_timeout < 1 or patience < 5:
        raise UserError(
            f"--start_timeout={start_timeout} must be at least 1, --patience={patience} at least 5"
        )
    address = _address_arguments(distributed, num_processes, process_id)
    if distributed == "off":
        return
    connection.patience = patience
    # Training handles SIGTERM by now. For other commands JAX would only note it and go on.
    ends_at_sigterm = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ends_at_sigterm:
        jax.config.update("jax_enable_preemption_service", False)
    connected = threading.Event()
    threading.Thread(
        target=_end_if_incomplete, args=(start_timeout, connected), daemon=True
    ).start()
    try:
        # When JAX's own timeout passes, it aborts without naming a process: ours must pass first.
        jax.distributed.initialize(
            **address,
            initialization_timeout=start_timeout + 60,
            heartbeat_timeout_seconds=patience + 30,
        )
    except Exception as error:
        # No scheduler, or a notebook that has started JAX's devices before.
        single = "coordinator_address should be defined|must be called before any JAX calls"
        if not address and re.search(single, str(error)) and not _in_indexed_job():
            return
        hint = ' (pip install -e ".[k8s]")' if _in_indexed_job() else ""
        raise UserError(
            f"the processes could not be connected: {' '.join(str(error).split())}{hint}; "
            "--distributed=off runs this process alone"
        ) from None
    finally:
        connected.set()
    if hosts.several():
        if ends_at_sigterm:
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        _meet(start_timeout)
    else:
        hosts.log0(f"process 0 on {_local_devices()}")


def _address_arguments(distributed: str, num_processes: int, process_id: int) -> dict[str, Any]:
    """Arguments of jax.distributed.initialize; none if JAX is to find them. Raises UserError."""
    if distributed in ("off", "auto"):
        if num_processes or process_id != -1:
            raise UserError(
                "--num_processes and --process_id require --distributed=HOST:PORT, not "
                f"{distributed}"
            )
        return {}
    if not re.fullmatch(r".+:[0-9]+", distributed):
        raise UserError(f"--distributed={distributed} must be auto, off or HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--distributed={distributed} requires --num_processes and a --process_id below it, "
            f"not {num_processes} and {process_id}"
        )
    return {
        "coordinator_address": distributed,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
        "coordinator_bind_address": rendezvous.bind_address(distributed),
    }


def _in_indexed_job() -> bool:
    """Whether this is a pod of a Kubernetes Indexed Job, which JAX needs a package to detect."""
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(os.environ)


def _end_if_incomplete(timeout: float, connected: threading.Event) -> None:
    """While JAX waits for all processes: end this one after `timeout` and say which are missing."""
    deadline = time.monotonic() + timeout
    service = connection.service
    while service.client is None or service.coordinator_address is None:
        if connected.wait(0.05):
            return
        if time.monotonic() > deadline:
            _end(f"the scheduler did not list the processes within {timeout:.0f} s")
    message = rendezvous.missing_processes(
        service.coordinator_address,
        service.process_id,
        service.num_processes,
        deadline - time.monotonic(),
        connected,
    )
    if message is not None:
        _end(message)


def _meet(timeout: int) -> None:
    """Begin to watch the other processes, print everybody's devices and sum over all of them."""
    connection.watchers += [
        threading.Thread(target=watch, daemon=True) for watch in (_watch_barriers, _watch_notice)
    ]
    for watcher in connection.watchers:
        watcher.start()
    timer = threading.Timer(timeout, _end, [
        f"the devices of all processes did not compute a sum within {timeout} s, though the "
        "processes answer; check that the network between them is open"
    ])  # fmt: skip
    timer.daemon = True
    timer.start()
    for process, devices in enumerate(hosts.exchange("devices", _local_devices())):
        hosts.log0(f"process {process} on {devices}")
    mesh = parallel.make_mesh()
    ones = parallel.put(np.ones(mesh.size), parallel.split_batch(mesh))
    jax.jit(lambda x: x.sum(), out_shardings=parallel.replicated(mesh))(ones).block_until_ready()
    timer.cancel()


def _local_devices() -> str:
    """This host's name and its devices. Raises UserError if JAX finds none."""
    try:
        devices = jax.local_devices()
    except Exception as error:
        raise UserError(f"JAX finds no devices: {reason(error)}") from None
    ids = ", ".join(str(device.id) for device in devices)
    return f"{socket.gethostname()}: {len(devices)} × {devices[0].device_kind} ({ids})"


def _watch_barriers() -> None:
    """End this process once another one does not reach a barrier within `patience` seconds."""
    while not connection.ended.wait(connection.patience / 12):
        try:
            milliseconds = int(connection.patience * 1000)
            connection.service.client.wait_at_barrier("mdt_jax/alive", milliseconds)
        except Exception as error:
            if not connection.ended.is_set():
                _end(_dead_processes(error))


def _dead_processes(error: Exception) -> str:
    """The message for a barrier's error, which lists the processes that did not reach it."""
    listed = str(error).partition("task names:")[2].partition("RPC:")[0]
    numbers = [int(number) for number in re.findall(r"^\s*(\d+)\s*$", listed, re.M)]
    dead = rendezvous.join_numbers(numbers) if numbers else f"another process ({reason(error)})"
    return f"{dead} did not answer for {connection.patience:.0f} s; {RESUME}"


def _watch_notice() -> None:
    """End this process once another one gives notice that it ends, or the coordinator is gone."""
    while not connection.ended.is_set():
        try:
            notice = connection.get(LEFT, hosts.LONGEST_WAIT)
        except UserError as error:
            notice = f"2 {error}"
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            notice = f"2 process 0, the coordinator, is gone; {RESUME}"
        if not connection.ended.is_set():
            code, _, line = notice.partition(" ")
            _end(line, int(code))


def _end(line: str, code: int = 2) -> None:
    """Print a line and end this process at once, without JAX's shutdown, which waits for others."""
    progress.log(f"{'error: ' if code else ''}{hosts.name()}: {line}")
    leave_at_once(code)


def leave_at_once(code: int, reason: str = "") -> None:
    """End this process. The others print the reason, if there is one, and end as well."""
    connection.ended.set()
    if reason:
        with contextlib.suppress(Exception):  # another process may have given notice before
            connection.put(LEFT, f"{code} {hosts.name()} stopped: {reason}")
    if hosts.several() and hosts.is_first():
        time.sleep(3)  # without the coordinator, JAX would abort the others before they have ended
    os._exit(code)


def shutdown(code: int = 0) -> None:
    """Wait for all processes at the end of a run, and disconnect.

    code: the exit code if a watcher still waits in a call, which ends this process at once.
    """
    if not hosts.several():
        return
    hosts.exchange("shutdown", None, LONGEST_REST)
    connection.ended.set()
    jax.distributed.shutdown()
    for watcher in connection.watchers:  # Python must not exit while one still waits in a call
        watcher.join(timeout=10)
    if any(watcher.is_alive() for watcher in connection.watchers):
        leave_at_once(code)
