"""Who is there when the processes of a run start: process 0 calls the roll at a port of its own.

JAX ends a start that fails with an abort that names nobody.
"""

import contextlib
import ipaddress
import os
import socket
import threading
import time

from mdt_jax.runtime import signing

REPORT, VERDICT = "mdt_jax/report", "mdt_jax/verdict"  # what is signed


def hold(
    coordinator: str, process: int, count: int, seconds: float, arrived: threading.Event
) -> str | None:
    """Wait until `arrived` is set, and return None; after `seconds` return who is missing.

    coordinator: HOST:PORT of process 0; process: the number of this one of `count`.
    """
    end = time.monotonic() + seconds
    host, _, port = coordinator.rpartition(":")
    address = (host.strip("[]"), roll_call_port(int(port)))
    with contextlib.ExitStack() as stack:
        if process == 0:
            line = _call(_listening_at(coordinator, address[1]), count, end, arrived, stack)
        else:
            line = _report(address, process, end, arrived, stack)
        if arrived.is_set():
            return None
        if line is None and _answers((address[0], int(port))):
            line = f"not all {count} processes came within {seconds:.0f} s"
        elif line is None:
            line = (
                f"the coordinator, process 0 at {coordinator}, did not answer within "
                f"{seconds:.0f} s: does it run there, and is the port open?"
            )
        return line


def bind_address(coordinator: str) -> str | None:
    """Where process 0 listens: what JAX's variable says, or the coordinator's own address, if it is
    one of this machine, so that other networks do not reach the port. None, which is everywhere,
    for a name: it may mean another address here than elsewhere.
    """
    if told := os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return told
    host, _, port = coordinator.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        socket.create_server((str(address), 0), family=family).close()
    except (ValueError, OSError):
        return None
    return f"{host}:{port}"


def roll_call_port(port: int) -> int:
    """Where process 0 calls the roll, given the coordinator's port: where no other run's would be.

    On Slurm JAX takes 61440 + job % 4096, so that the next ports are those of the next jobs.
    """
    return 1024 + (port + 10_000) % 60_000


def _listening_at(coordinator: str, port: int) -> socket.socket | None:
    """A server at a port of the coordinator's address; None where there can be none."""
    host = (bind_address(coordinator) or ":").rpartition(":")[0].strip("[]")
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError:
        return None


def _call(
    server: socket.socket | None, count: int, end: float, arrived: threading.Event, stack
) -> str | None:
    """Process 0's part: collect who reports, and tell them at the end who did not."""
    began, here = time.monotonic(), {0: None}
    if server is None:
        arrived.wait(end - began)
        return None
    stack.enter_context(server).settimeout(0.2)
    while not arrived.is_set() and time.monotonic() < end:
        with contextlib.suppress(OSError):
            reporting = server.accept()[0]
            reporting.settimeout(2)
            said = signing.signed_text(REPORT, reporting.recv(100))
            if said is None:  # not of this run
                reporting.close()
            else:
                here[int(said)] = stack.enter_context(reporting)
    missing = sorted(set(range(count)) - set(here))
    if not missing:  # for us; JAX has not seen all of them
        return None
    line = f"{names(missing)} of {count} did not come within {end - began:.0f} s"
    for reported in filter(None, here.values() if not arrived.is_set() else ()):
        with contextlib.suppress(OSError):
            reported.sendall(signing.sign(VERDICT, line))
    return line


def _report(address, process: int, end: float, arrived: threading.Event, stack) -> str | None:
    """Any other's part: report, and hear at the end who did not."""
    while not arrived.is_set() and time.monotonic() < end:
        with contextlib.suppress(OSError):
            first = stack.enter_context(socket.create_connection(address, timeout=2))
            first.sendall(signing.sign(REPORT, str(process)))
            first.settimeout(0.2)
            while not arrived.is_set() and time.monotonic() < end + 5:
                with contextlib.suppress(TimeoutError):
                    heard = signing.signed_text(VERDICT, first.recv(10_000))
                    if heard is not None:
                        return heard
                    break  # process 0 is through with it, or it is somebody else's port
        arrived.wait(0.2)
    return None


def _answers(address) -> bool:
    try:
        socket.create_connection(address, timeout=2).close()
        return True
    except OSError:
        return False


def names(processes: list[int]) -> str:
    """As in a sentence."""
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))}"
