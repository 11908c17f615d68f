"""Files that are there whole or not at all, and what is wrong where one cannot be read."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping

import numpy as np

from mdt_jax.runtime.errors import DamagedError, UserError

# What keeps a sound file from being read at the moment.
PASSING = (
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EAGAIN,
    errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
)  # fmt: skip
# The same as libraries say it that do not hand on the system's own words.
SAID = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "can't start new thread", "bad_alloc")


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike, failures: tuple[type[Exception], ...] = ()
) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `path` when the block ends well; else nothing is left.

    failures: what the writer raises, besides OSError, where the disk is full. Raises UserError
    for these.
    """
    path = pathlib.Path(path)
    temporary = temp_path(path)
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # some writers replace the file by one that nobody else may read
        fsync(temporary)
        os.replace(temporary, path)
    except (OSError, *failures) as error:
        raise UserError(f"{path} could not be written: {reason(error)}{free(path)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz, whole or not at all. Raises UserError where the disk is full."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        # NumPy's stub takes every keyword for its own `allow_pickle`, too.
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def fsync(path: pathlib.Path) -> None:
    """Wait until a file is on the disk, so that a power cut cannot leave its name without it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def temp_path(path: pathlib.Path) -> pathlib.Path:
    """A temporary name in the same folder that nobody else uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def reason(error: Exception) -> str:
    """An error in one line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def free(path: pathlib.Path) -> str:
    """ " (… MB free there)" for a message, or nothing where it cannot be told."""
    room = _room(path)
    return "" if room is None else f" ({room / 1e6:.1f} MB free there)"


def check_writable(folder: pathlib.Path, name: str) -> None:
    """Raise UserError where no file can be made in a folder, or where there is none yet, in the
    nearest one above it. Nothing is left there.

    name: what the message begins with. A few bytes are written, too: a full disk or quota takes
    empty files.
    """
    try:
        place = pathlib.Path(os.path.realpath(folder))
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file, not a folder")
        probe = temp_path(place / ".write-test")
        try:
            with open(probe, "xb") as file:
                file.write(bytes(4096))
            fsync(probe)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
    except OSError as error:
        raise UserError(f"{name} cannot be written to: {reason(error)}") from None


def check_room(path: pathlib.Path, size: int) -> None:
    """Raise UserError where `size` bytes do not fit on the disk that `path` is to be on."""
    room = _room(path)
    if room is not None and size > room:
        raise UserError(
            f"{path} could not be written: it takes {size / 1e6:.1f} MB, and "
            f"{room / 1e6:.1f} MB are free there"
        )


def _room(path: pathlib.Path) -> int | None:
    """Free bytes on the disk of a folder, or of the one that a file is to be in; links followed."""
    place = path.resolve()
    try:
        return shutil.disk_usage(place if place.is_dir() else path.parent.resolve()).free
    except OSError:
        return None


def passes(error: BaseException | None) -> bool:
    """Whether reading raised this for want of access, open files or memory, or for a failing disk,
    so that the file itself may be sound.
    """
    if error is None:
        return False
    parts = getattr(error, "exceptions", ())  # of an ExceptionGroup
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in PASSING)
        or any(words in text for words in (*SAID, *map(os.strerror, PASSING)))
        or any(map(passes, parts))
        or passes(error.__cause__ or error.__context__)
    )


def check_regular(path: str | os.PathLike) -> None:
    """Raise OSError for a pipe, a socket or a device, which reading might wait for without end, and
    where nothing is there.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def read_json(path: pathlib.Path) -> dict | None:
    """A JSON object that we wrote, or None where there is no such file.

    Raises DamagedError where it holds anything else, UserError where it cannot be read just now.
    """
    try:
        check_regular(path)
        found = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(found, dict):
        raise DamagedError(f"{path} is damaged, or was edited: it holds no JSON object")
    return found


def local(path: str) -> str:
    """A path on this machine's file systems; ~, ~USER, $NAME and ${NAME} are replaced.

    Raises UserError for a URL, and where there is no such user or variable.
    """
    # With one slash, too, which is what pathlib leaves of a URL; tfds:/FOLDER names a prepared set.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(?!tfds:)[A-Za-z][A-Za-z0-9+.-]+:/", path):
        raise UserError(
            f"{path} is a URL, and mdt_jax reads and writes local files; mount it, or copy it"
        )
    found = os.path.expanduser(os.path.expandvars(path))
    if found[:1] in ("~", "$"):
        what = "user" if found[0] == "~" else "environment variable"
        raise UserError(f"{path}: there is no {what} of this name; a file of this name is ./{path}")
    return found


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is text, not bytes in another encoding than the file system's."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
