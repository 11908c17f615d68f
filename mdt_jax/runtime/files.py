"""Local files: written atomically, and checked before they are read or written."""

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
import tempfile
from collections.abc import Iterator, Mapping

import numpy as np

from mdt_jax.runtime.errors import DamagedError, UserError, causes

# Errors that may pass, so that the file may be sound: by number, and as libraries word them.
PASSING = (
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EAGAIN,
    errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
)  # fmt: skip
PASSING_TEXTS = (
    "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "can't start new thread", "bad_alloc",
    *map(os.strerror, PASSING),
)  # fmt: skip


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike, failures: tuple[type[Exception], ...] = ()
) -> Iterator[pathlib.Path]:
    """A temporary path to write to. It becomes `path` at the end of the block, or is removed if
    the block raises.

    failures: what the writer raises, besides OSError, if the disk is full. Raises UserError for
    them.
    """
    path = pathlib.Path(path)
    temporary = temp_path(path)
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # some writers make a new file that only its owner may read
        fsync(temporary)
        os.replace(temporary, path)
    except (OSError, *failures) as error:
        raise UserError(f"{path} could not be written: {reason(error)}{free(path)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz atomically. Raises UserError if the disk is full."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        # NumPy's stub takes every keyword for its own `allow_pickle`, too.
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def fsync(path: pathlib.Path) -> None:
    """Wait until a file is on the disk: a power cut might keep its name and lose its data."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def temp_path(path: pathlib.Path) -> pathlib.Path:
    """A name for a temporary file in the same folder, which no other process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def reason(error: Exception) -> str:
    """An error's text in one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def free(path: pathlib.Path) -> str:
    """ " (… MB free there)", the end of a message, or "" if the free space is not known."""
    space = _free_space(path)
    return "" if space is None else f" ({space / 1e6:.1f} MB free there)"


def check_writable(folder: pathlib.Path, name: str) -> None:
    """Raise UserError if no file can be written in a folder. Leaves nothing there.

    If the folder does not exist, this checks the nearest existing one above it. name: the subject
    of the message. The test file has some bytes, since a full disk or quota accepts empty files.
    """
    try:
        existing = pathlib.Path(os.path.realpath(folder))
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is a file, not a folder")
        with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{name} cannot be written to: {reason(error)}") from None


def check_room(path: pathlib.Path, size: int) -> None:
    """Raise UserError if `size` bytes do not fit on the disk of `path`, which need not exist."""
    space = _free_space(path)
    if space is not None and size > space:
        raise UserError(
            f"{path} could not be written: it takes {size / 1e6:.1f} MB, and {space / 1e6:.1f} MB "
            "are free there"
        )


def _free_space(path: pathlib.Path) -> int | None:
    """Free bytes on the disk of a folder, or of a file's folder. Follows links."""
    target = path.resolve()
    try:
        return shutil.disk_usage(target if target.is_dir() else path.parent.resolve()).free
    except OSError:
        return None


def passes(error: BaseException | None) -> bool:
    """Whether missing access, open files or memory, or a failing disk caused a read error.

    The file itself may be sound then.
    """
    return error is not None and any(
        isinstance(each, MemoryError)
        or (isinstance(each, OSError) and each.errno in PASSING)
        or any(text in str(each) for text in PASSING_TEXTS)
        for each in causes(error)
    )


def check_regular(path: str | os.PathLike) -> None:
    """Raise OSError if nothing exists at a path, or a pipe, a socket or a device, whose reading
    might never end.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def read_json(path: pathlib.Path) -> dict | None:
    """The JSON object in a file that this package wrote; None if the file does not exist.

    Raises DamagedError for any other content, UserError if the file cannot be read now.
    """
    try:
        check_regular(path)
        content = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged, or was edited: expected a JSON object")
    return content


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local(path: str) -> str:
    """A path on this machine's file systems, with ~, ~USER, $NAME and ${NAME} replaced.

    Raises UserError for a URL and for an unknown user or variable.
    """
    # pathlib leaves one slash of a URL's two. tfds:/FOLDER is a prepared data set, not a URL.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(?!tfds:)[A-Za-z][A-Za-z0-9+.-]+:/", path):
        raise UserError(
            f"{path} is a URL, and mdt_jax reads and writes local files; mount it, or copy it"
        )
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded[:1] in ("~", "$"):
        what = "user" if expanded[0] == "~" else "environment variable"
        raise UserError(f"{path}: there is no {what} of this name; a file of this name is ./{path}")
    return expanded


def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is valid in the file system's encoding."""
    return not re.search("[\ud800-\udfff]", os.fspath(path))
