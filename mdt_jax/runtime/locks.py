"""Lock files, so that one run at a time writes to a place. A lock ends with its process."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from mdt_jax.runtime import leases
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, exists, in_bucket, reason
from mdt_jax.runtime.leases import describe
from mdt_jax.runtime.progress import log

BEAT = 5.0  # seconds between two heartbeats of a holder
WATCH = 15.0  # seconds in which a living holder has a heartbeat
# The errors of flock on file systems without locks.
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


def beside(out: Path) -> Path:
    """The lock file of an output file, in the same folder."""
    return out.with_name(f".{out.name}.lock")


def check_free(path: Path, what: str) -> None:
    """Raise UserError if another process holds the lock file `path`; parameters as of `held`."""
    if exists(path):
        with held(path, what):
            pass


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[Callable[[], None]]:
    """Hold the lock file `path` in the block, and remove it at the end.

    Yields a function that raises UserError where the lock is lost, which happens only in a bucket.
    """
    holding: Any = leases.held if in_bucket(path) else _held
    with holding(path, what) as check:
        yield check


@contextlib.contextmanager
def _held(path: pathlib.Path, what: str) -> Iterator[Callable[[], None]]:
    """`held` on a disk.

    The kernel releases the lock when the process ends in any way, so that a left-over file blocks
    nobody. Some network file systems do not show locks to other machines. There the holder's
    heartbeat counts: it touches the file every BEAT seconds.

    Creates the folder, and removes a new one at the end if it has no other file. what: the
    protected output, the subject of messages. Raises UserError if another process holds the lock or
    if the file cannot be created.
    """
    new_folder = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path, what)
    except OSError as error:
        raise UserError(f"{what} cannot be written to: {path}: {reason(error)}") from None
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(file.fileno(), ended), daemon=True)
    heart.start()
    try:
        yield lambda: None
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(OSError):
            path.unlink()
            if new_folder:
                path.parent.rmdir()  # fails if the folder has other files
        with contextlib.suppress(OSError):  # a forked process may have a copy of the open file
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def _acquire(path: pathlib.Path, what: str) -> BinaryIO:
    """Open and lock the lock file, and write this process's name into it."""
    host = socket.gethostname()
    while True:
        file = open(path, "a+b")  # noqa: SIM115 (it stays open)
        try:
            locked = _lock(file)
            holder = _read_holder(file)
            elsewhere = locked is None or holder.get("host") != host
            if locked is False or (holder and elsewhere and _is_alive(path, holder)):
                raise UserError(f"{what} {describe(holder)}")
            # The previous holder may have removed the file after it was opened here.
            if not _is_at(file, path):
                file.close()
                continue
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(json.dumps({"host": host, "process": os.getpid(), "since": since}).encode())
            file.flush()
            return file
        except BaseException:
            file.close()
            raise


def _lock(file: BinaryIO) -> bool | None:
    """Whether this process has the lock now; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
    """Whether an open file is the one that exists at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _read_holder(file: BinaryIO) -> dict:
    """The host, process and time in a lock file; {} if the file has other content."""
    file.seek(0)
    try:
        holder = json.loads(file.read(1000))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(path: pathlib.Path, holder: dict) -> bool:
    """Whether the holder touches its file within WATCH seconds. Does not compare clocks."""
    log(
        f"{path} was left by process {holder.get('process')} on {holder.get('host')}; looking for "
        f"{WATCH:.0f} s whether it still runs …"
    )
    try:
        first, deadline = _touch_time(path), time.monotonic() + WATCH
        while time.monotonic() < deadline:
            time.sleep(min(BEAT, WATCH) / 10)
            if _touch_time(path) != first:
                return True
    except FileNotFoundError:  # the holder has just ended
        pass
    return False


def _touch_time(path: pathlib.Path) -> int:
    """When a file was last touched, in ns. Opening it refreshes a network file system's cache."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)
