"""Ctrl-C and SIGTERM are answered even while the main thread is inside a library's call.

Python runs handlers in the main thread, between two of its own instructions. A compilation or a
download that is silent lets none run, so that here a second thread hears of each signal at once.
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

GRACE = 3.0  # seconds in which the main thread may leave by itself
_line: str | None = None  # what is said where any signal is to end the process


def end_soon(line: str | None) -> None:
    """From now on a signal ends the process: after GRACE seconds, where its handler did not.

    line: what is said then; None: signals are left to their handlers again.
    """
    global _line
    _line = line


def end_in(seconds: float) -> None:
    """End the process with exit code 0 then, where threads that never answer would keep it."""
    timer = threading.Timer(seconds, os._exit, [0])
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
    watch = threading.Thread(target=_watch, args=(reading,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        end_soon(None)
        signal.set_wakeup_fd(before)
        os.close(writing)
        watch.join()
        os.close(reading)


def _watch(reading: int) -> None:
    interrupted, deadline, code = False, None, 0
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([reading], [], [], left)[0]:
            os._exit(code)
        told = os.read(reading, 1)
        if not told:
            return
        if told[0] == signal.SIGINT and interrupted:
            _print("stopped at once by the second Ctrl-C")
            if hosts.several():
                cluster.leave_at_once(128 + signal.SIGINT, "Ctrl-C")
            os._exit(128 + signal.SIGINT)
        interrupted |= told[0] == signal.SIGINT
        if _line is not None and deadline is None and told[0] in (signal.SIGINT, signal.SIGTERM):
            _print(_line)
            deadline, code = time.monotonic() + GRACE, 128 + told[0]


def _print(line: str) -> None:
    """To stderr, if it takes it: the main thread may hold Python's lock on the stream."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stderr.fileno()
        if select.select([], [number], [], 0)[1]:
            os.write(number, f"{line}\n".encode())
