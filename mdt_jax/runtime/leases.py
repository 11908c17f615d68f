"""Locks in buckets: an object with the name of its holder, who writes it again as long as it runs.

A bucket has no locks that end with a process. It does have writes that fail where the object exists
already, so that one of several processes creates it. A lock that is not renewed is taken over.
"""

import contextlib
import functools
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from mdt_jax.runtime import buckets
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log

BEAT = 10.0  # seconds between two writes of a holder
WATCH = 60.0  # seconds in which a living holder has written
SETTLE = 2.0  # seconds after which two processes that take over a lock see who was last


class Lease:
    """A lock that this process holds until `release`."""

    def __init__(self, path: epath.Path, what: str):
        """Acquire the lock. what: the protected output, the subject of messages.

        Raises UserError if another process holds it, and where the bucket cannot be written.
        """
        self._path, self._what = path, what
        self._holder = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "namespace": _namespace(),
            "token": secrets.token_hex(16),
        }
        self._taken_by = ""
        try:
            self._acquire()
        except UserError:
            raise
        except Exception as error:  # of many kinds, by client
            text = buckets.problem(error) or error
            raise UserError(f"{what} cannot be written to: {path}: {text}") from None
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _acquire(self) -> None:
        client, path = buckets.client(self._path), str(self._path)
        while True:
            try:
                client.pipe_file(path, self._content(), mode="create")
                return
            except FileExistsError:
                pass
            with contextlib.suppress(FileNotFoundError):  # the holder has just ended
                holder = self._read()
                if holder.get("token") == self._holder["token"]:
                    return  # the client repeated a request whose answer was lost
                if self._is_alive(holder):
                    raise UserError(f"{self._what} {describe(holder)}")
                client.pipe_file(path, self._content())
                time.sleep(SETTLE)
                if self._read().get("token") == self._holder["token"]:
                    return

    def check(self) -> None:
        """Raise UserError where another process has taken the lock over."""
        if self._taken_by:
            raise UserError(
                f"{self._what} {self._taken_by}: this process could not renew its lock for "
                f"{WATCH:.0f} s, so that the other took it over"
            )

    def release(self) -> None:
        """Give the lock back, unless another process has taken it over."""
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(Exception):  # it is not renewed, so that it ends in any case
            if self._read().get("token") == self._holder["token"]:
                buckets.remove(self._path)

    def _content(self) -> bytes:
        return json.dumps(self._holder).encode()

    def _read(self) -> dict:
        """The holder in the object; {} for other content. Raises FileNotFoundError."""
        try:
            holder = json.loads(buckets.client(self._path).cat_file(str(self._path)))
        except (ValueError, RecursionError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # the next one may reach the bucket
                holder = self._read()
                if holder.get("token") != self._holder["token"]:
                    self._taken_by = describe(holder)
                    return
                buckets.client(self._path).pipe_file(str(self._path), self._content())

    def _is_alive(self, holder: dict) -> bool:
        """Whether the holder writes its object within WATCH seconds by the clock of the bucket.

        A process of the same machine that has ended is known at once.
        """
        if holder.get("namespace") and holder["namespace"] == self._holder["namespace"]:
            try:
                os.kill(int(holder["process"]), 0)
            except ProcessLookupError:
                return False
            except (OSError, OverflowError, TypeError, ValueError):
                pass
        first, age = self._written(), self._age()
        if age >= WATCH:
            return False
        log(
            f"{self._path} was left by process {holder.get('process')} on {holder.get('host')}; "
            f"looking for {WATCH - age:.0f} s whether it still runs …"
        )
        deadline = time.monotonic() + WATCH - age
        while time.monotonic() < deadline:
            time.sleep(min(BEAT, WATCH) / 10)
            if self._written() != first:
                return True
        return False

    def _written(self) -> object:
        """When the object was written."""
        client = buckets.client(self._path)
        return client.modified(str(self._path))

    def _age(self) -> float:
        """Seconds since the object was written, both times by the clock of the bucket."""
        client, probe = buckets.client(self._path), f"{self._path}.{secrets.token_hex(8)}"
        client.pipe_file(probe, b"")
        try:
            return (client.modified(probe) - self._written()).total_seconds()  # type: ignore
        finally:
            client.rm_file(probe)


@contextlib.contextmanager
def held(path: epath.Path, what: str) -> Iterator[Callable[[], None]]:
    """Hold a lock in the block; see `Lease`. Yields its `check`."""
    lease = Lease(path, what)
    try:
        yield lease.check
    finally:
        lease.release()


def describe(holder: dict) -> str:
    """The predicate of the message that another process holds a lock."""
    by = "another process"
    if holder:
        by = f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
    return f"is in use by {by}; wait until it ends, or choose another place"


@functools.cache
def _namespace() -> str:
    """This boot of this machine and the namespace of its process numbers; "" if not known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
