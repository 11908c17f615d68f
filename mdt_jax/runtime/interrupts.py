"""Ctrl-C and SIGTERM while the main thread is inside a library's call.

Python runs signal handlers in the main thread, between two of its instructions. During a long
compilation or a blocked download none runs. Here a second thread receives each signal at once.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from mdt_jax.runtime import cluster, hosts

GRACE = 3.0  # seconds in which the main thread may end by itself
_end_message: str | None = None  # printed at a signal that ends the process; None if it does not


def end_soon(message: str | None) -> None:
    """From now on, end the process GRACE seconds after a signal if its handler did not.

    message: the line to print then. None leaves signals to their handlers again.
    """
    global _end_message
    _end_message = message


def end_in(seconds: float, code: int) -> None:
    """End the process with an exit code after `seconds`, even if other threads still block."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Inside, a second Ctrl-C ends the process at once, with exit code 130 and one line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        end_soon(None)
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(reading: int) -> None:
    """Read the numbers of signals from a pipe until it is closed."""
    interrupted, deadline, code = False, None, 0
    while True:
        timeout = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([reading], [], [], timeout)[0]:
            os._exit(code)
        received = os.read(reading, 1)
        if not received:
            return
        number = received[0]
        if number == signal.SIGINT and interrupted:
            _print("stopped at once by the second Ctrl-C")
            if hosts.several():
                cluster.leave_at_once(128 + number, "Ctrl-C")
            os._exit(128 + number)
        interrupted |= number == signal.SIGINT
        ends = number in (signal.SIGINT, signal.SIGTERM)
        if _end_message is not None and deadline is None and ends:
            _print(_end_message)
            deadline, code = time.monotonic() + GRACE, 128 + number


def _print(line: str) -> None:
    """Write to stderr's file, if it is ready: the main thread may hold Python's lock on stderr."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stderr.fileno()
        if select.select([], [number], [], 0)[1]:
            os.write(number, f"{line}\n".encode())
