"""Several processes at once, on this machine."""

import socket
import subprocess
import time

from mdt_jax.runtime.rendezvous import report_port
from tests.conftest import start_command


def free_port() -> int:
    """A port that nobody listens at, nor at the port for its processes' reports."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            try:
                two.bind(("127.0.0.1", report_port(one.getsockname()[1])))
            except OSError:
                continue
            return one.getsockname()[1]


def start_hosts(count: int, what: str, *arguments: str) -> list[subprocess.Popen]:
    """The processes of tests/processes/hosts.py."""
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        start_command(
            "tests.processes.hosts", coordinator, str(count), str(number), what, *arguments
        )
        for number in range(count)
    ]


def start_as_one(count: int, *command: str) -> list[subprocess.Popen]:
    """The processes of one run of a command, such as "mdt_jax.sample", with its flags."""
    address = f"--distributed=127.0.0.1:{free_port()}"
    return [
        start_command(*command, address, f"--num_processes={count}", f"--process_id={number}")
        for number in range(count)
    ]


def ends(processes: list[subprocess.Popen], timeout: float = 500) -> list[tuple[int, str]]:
    """(exit code, what it printed, stdout first) of each."""
    until, ended = time.time() + timeout, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(until - time.time(), 1))
            ended.append((process.returncode, out + err))
    finally:
        for process in processes:
            process.kill()
    return ended


def all_well(processes: list[subprocess.Popen]) -> str:
    """What the first process printed; all must end with 0."""
    ended = ends(processes)
    assert [code for code, _ in ended] == [0] * len(ended), ended
    return ended[0][1]
