"""Work of the page, one job at a time in a thread of its own, with progress and a stop."""

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mdt_jax import cli
from mdt_jax.runtime import progress
from mdt_jax.runtime.errors import UserError

POLL = 0.2  # seconds between looks at a job that reports nothing
COMPILING = "Waiting for the first step. New settings are compiled first, which takes a while."


class Stopped(Exception):
    """Somebody pressed Stop."""


class Jobs:
    """Runs jobs in the order in which they come."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "job")
        self._stops: dict[str, threading.Event] = {}
        self._closed = False

    def run(self, owner: str, work: Callable[[], Any]) -> Generator[str, None, Any]:
        """Yields what a job is doing, and returns what it returns.

        owner: whose job it is, for `stop`. A generator that is closed stops its job. Raises
        UserError for a user's mistake, and Stopped.
        """
        if self._closed:
            raise Stopped
        stop, reports = threading.Event(), queue.SimpleQueue[str]()
        self._stops[owner] = stop

        def listen(what: str, done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped
            if done:
                reports.put(f"{what.capitalize()}: {done:,} of {total:,} steps")

        def listened() -> Any:
            listen("", 0, 0)
            with progress.listening(listen):
                return work()

        job = self._thread.submit(listened)
        try:
            yield COMPILING
            while not job.done():
                try:
                    text = reports.get(timeout=POLL)
                    while not reports.empty():
                        text = reports.get()
                    yield text
                except queue.Empty:
                    pass
            return job.result()
        except Stopped:
            raise
        except Exception as error:
            if line := cli.one_line(error):
                raise UserError(line) from None
            raise
        finally:
            stop.set()
            if self._stops.get(owner) is stop:
                del self._stops[owner]

    def stop(self, owner: str) -> bool:
        """Stop jobs of owners that begin with `owner`; returns whether there were any."""
        stops = [stop for name, stop in list(self._stops.items()) if name.startswith(owner)]
        for stop in stops:
            stop.set()
        return bool(stops)

    def close(self) -> None:
        """Stop all jobs, also those that come later, and wait until they have ended."""
        self._closed = True
        for stop in list(self._stops.values()):
            stop.set()
        self._thread.shutdown()
