"""One run at a time where files are written: a lock that ends with the process that holds it."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import BinaryIO

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason
from mdt_jax.runtime.progress import log

BEAT = 5.0  # seconds from one sign of life to the next
WATCH = 15.0  # seconds in which a holder that lives gives one
# What flock answers where a file system knows no locks.
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


def beside(out: pathlib.Path) -> pathlib.Path:
    """The lock file of a file that is to be written."""
    return out.with_name(f".{out.name}.lock")


def check_free(path: pathlib.Path, what: str) -> None:
    """Raise UserError where another process holds the lock file `path`; arguments as of `held`."""
    if os.path.exists(path):
        with held(path, what):
            pass


@contextlib.contextmanager
def held(path: pathlib.Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` in the block, and remove it at its end.

    The kernel gives the lock back when the process ends, however it ends, so a file that was left
    stands in nobody's way. On file systems whose locks other machines do not see, the holder's
    signs of life tell: it touches the file every BEAT seconds.

    The folder is made where there is none, and removed if nothing else is in it at the end. what:
    what is written, to begin a message with. Raises UserError where another process holds the lock,
    or where the file cannot be made.
    """
    new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path, what)
    except OSError as error:
        raise UserError(f"{what} cannot be written to: {path}: {reason(error)}") from None
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(file.fileno(), ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError):
            path.unlink()
            if new:
                path.parent.rmdir()  # unless something was written there
        with contextlib.suppress(OSError):  # a copy of it may be open in a forked process
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def _take(path: pathlib.Path, what: str) -> BinaryIO:
    """The open lock file, locked, with the name of this process in it."""
    while True:
        file = open(path, "a+b")  # noqa: SIM115 (it stays open)
        try:
            seen = _lock(file)
            holder = _holder(file)
            if seen is False:
                raise UserError(f"{what} {_who(holder)}")
            here = socket.gethostname()
            if holder and (seen is None or holder.get("host") != here) and _lives(path, holder):
                raise UserError(f"{what} {_who(holder)}")
            # Whoever held it before may have removed the file since it was opened here.
            if not _is_at(file, path):
                file.close()
                continue
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(json.dumps({"host": here, "process": os.getpid(), "since": since}).encode())
            file.flush()
            return file
        except BaseException:
            file.close()
            raise


def _lock(file: BinaryIO) -> bool | None:
    """Whether the lock is this process's now; None where the file system knows no locks."""
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
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file: BinaryIO) -> dict:
    """What the last holder wrote of itself; {} where there is nothing of the kind."""
    file.seek(0)
    try:
        found = json.loads(file.read(1000))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _who(holder: dict) -> str:
    """A predicate that names who holds a lock."""
    if not holder:
        return "is in use by another process; wait until it ends, or choose another place"
    return (
        f"is in use by process {holder.get('process')} on {holder.get('host')} since "
        f"{holder.get('since')}; wait until it ends, or choose another place"
    )


def _lives(path: pathlib.Path, holder: dict) -> bool:
    """Whether the file is touched within WATCH seconds; no clocks are compared."""
    log(
        f"{path} was left by process {holder.get('process')} on {holder.get('host')}; looking for "
        f"{WATCH:.0f} s whether it still runs …"
    )
    try:
        first, until = _touched(path), time.monotonic() + WATCH
        while time.monotonic() < until:
            time.sleep(min(BEAT, WATCH) / 10)
            if _touched(path) != first:
                return True
    except FileNotFoundError:  # it has just ended
        pass
    return False


def _touched(path: pathlib.Path) -> int:
    """When a file was touched last, in ns. Opening it makes a network's file system look again."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)
