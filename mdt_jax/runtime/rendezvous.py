"""Which processes are missing when a run starts.

JAX's start-up timeout does not say which processes did not connect. Therefore each one reports its
number to process 0 over a port of our own.
"""

import contextlib
import ipaddress
import os
import socket
import threading
import time

from mdt_jax.runtime.coordination import sign, signed_text

REPORT, VERDICT = "mdt_jax/report", "mdt_jax/verdict"  # keys of the signatures


def missing_processes(
    coordinator: str, process: int, count: int, seconds: float, connected: threading.Event
) -> str | None:
    """Wait until `connected` is set, and return None; after `seconds` say who is missing.

    coordinator: HOST:PORT of process 0. process: the number of this one of `count`.
    """
    host, _, port = coordinator.rpartition(":")
    address = (host.strip("[]"), report_port(int(port)))
    if process == 0:
        message = _collect_reports(coordinator, address[1], count, seconds, connected)
    else:
        message = _report(address, process, seconds, connected) or (
            f"the coordinator, process 0 at {coordinator}, did not answer within {seconds:.0f} s; "
            f"check that it runs there and that the ports {port} and {address[1]} are open"
        )
    return None if connected.is_set() else message


def bind_address(coordinator: str) -> str | None:
    """The address that process 0 binds, for JAX; None is every address of the machine.

    It is the value of JAX's own variable; else the coordinator's address if this machine has it,
    so that other networks do not reach the port. A host name may mean another address here than
    elsewhere, and gives None.
    """
    if address := os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return address
    host, _, port = coordinator.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        socket.create_server((str(address), 0), family=family).close()
    except (ValueError, OSError):
        return None
    return f"{host}:{port}"


def report_port(port: int) -> int:
    """The port for reports, given the coordinator's. No other run's coordinator is likely there.

    On Slurm JAX uses 61440 + job % 4096, so that the next ports are those of the next jobs.
    """
    return 1024 + (port + 10_000) % 60_000


def _open_server(coordinator: str, port: int) -> socket.socket:
    """A server at a port of the address that process 0 binds. Raises OSError."""
    host = (bind_address(coordinator) or ":").rpartition(":")[0].strip("[]")
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, dualstack_ipv6=both)


def _collect_reports(
    coordinator: str, port: int, count: int, seconds: float, connected: threading.Event
) -> str:
    """In process 0: collect the reports, and after `seconds` send the others who is missing."""
    deadline = time.monotonic() + seconds
    message = f"not all {count} processes connected within {seconds:.0f} s"
    try:
        server = _open_server(coordinator, port)
    except OSError:  # the port is in use
        connected.wait(seconds)
        return message
    reporters: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server).settimeout(0.2)
        while not connected.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                client = stack.enter_context(server.accept()[0])
                client.settimeout(2)
                number = signed_text(REPORT, client.recv(100))
                if number is None:  # not a process of this run
                    client.close()
                else:
                    reporters[int(number)] = client
        missing = sorted(set(range(1, count)) - set(reporters))
        if missing:  # otherwise JAX has not connected all of them
            message = f"{join_numbers(missing)} of {count} did not connect within {seconds:.0f} s"
        if not connected.is_set():
            for client in reporters.values():
                with contextlib.suppress(OSError):
                    client.sendall(sign(VERDICT, message))
    return message


def _report(
    address: tuple[str, int], process: int, seconds: float, connected: threading.Event
) -> str | None:
    """In another process: report to process 0, and receive who is missing."""
    deadline = time.monotonic() + seconds
    while not connected.is_set() and time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(address, timeout=2) as client,
        ):
            client.sendall(sign(REPORT, str(process)))
            client.settimeout(deadline + 5 - time.monotonic())
            message = signed_text(VERDICT, client.recv(10_000))  # or process 0 closes the port
            if message is not None:
                return message
        connected.wait(0.2)
    return None


def join_numbers(processes: list[int]) -> str:
    """ "process 1" or "processes 1, 2"."""
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"
