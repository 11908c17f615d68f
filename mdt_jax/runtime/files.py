"""Files on disks and in buckets: written whole or not at all, and checked before they are used."""

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
from etils import epath

from mdt_jax.runtime import buckets
from mdt_jax.runtime.errors import DamagedError, UserError, causes

URL = "[A-Za-z][A-Za-z0-9+.-]*://"
# A place on a disk, or in a bucket.
Path = pathlib.Path | epath.Path

# Errors that may pass, so that the file may be sound: by number, and as libraries word them.
PASSING = (
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EAGAIN,
    errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
)  # fmt: skip
PASSING_TEXTS = (
    "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "can't start new thread", "bad_alloc",
    "UNAVAILABLE", "UNAUTHENTICATED", "DEADLINE_EXCEEDED",
    *map(os.strerror, PASSING),
)  # fmt: skip


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return bool(buckets.scheme(path))


def as_path(path: str | os.PathLike) -> Path:
    """The path of a text. Raises UserError for another URL, and for a bucket whose client is not
    installed.
    """
    if in_bucket(path):
        return buckets.place(os.fspath(path))
    if re.match(URL, os.fspath(path)):
        anywhere(os.fspath(path))
    return pathlib.Path(path)


def absolute(path: str | os.PathLike) -> Path:
    """The path of a text, on a disk from its root."""
    place = as_path(path)
    return place.absolute() if isinstance(place, pathlib.Path) else place


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a folder."""
    return bool(buckets.kind(path)) if in_bucket(path) else os.path.exists(path)


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a file."""
    return buckets.kind(path) == "file" if in_bucket(path) else os.path.isfile(path)


def is_dir(path: str | os.PathLike) -> bool:
    """Whether there is a folder."""
    return buckets.kind(path) == "directory" if in_bucket(path) else os.path.isdir(path)


def names_in(folder: Path) -> list[str]:
    """The names in a folder; [] where it does not exist or is no folder."""
    if in_bucket(folder):
        return buckets.names(folder)
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; a bucket needs none."""
    if not in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file, unless there is none."""
    if in_bucket(path):
        buckets.remove(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it."""
    if in_bucket(folder):
        buckets.remove_folder(folder)
    else:
        shutil.rmtree(folder)


def fetched(path: str | os.PathLike) -> pathlib.Path:
    """A file to read: itself on a disk, or a copy of the object, which lasts as long as this
    process. Raises FileNotFoundError where there is no object.
    """
    return buckets.fetched(path) if in_bucket(path) else pathlib.Path(path)


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike, failures: tuple[type[Exception], ...] = ()
) -> Iterator[pathlib.Path]:
    """A temporary path to write to. It becomes `path` at the end of the block, or is removed if
    the block raises.

    failures: what the writer raises, besides OSError, if the disk is full. Raises UserError for
    them, and where a bucket cannot be written to.
    """
    if in_bucket(path):
        with _upload(epath.Path(path), failures) as temporary:
            yield temporary
        return
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


@contextlib.contextmanager
def _upload(path: epath.Path, failures: tuple[type[Exception], ...]) -> Iterator[pathlib.Path]:
    """`atomic_write` in a bucket."""
    with tempfile.TemporaryDirectory(prefix="mdt_jax-") as folder:
        temporary = pathlib.Path(folder) / path.name
        try:
            temporary.touch()
            yield temporary
        except (OSError, *failures) as error:
            raise UserError(
                f"{temporary} could not be written: {reason(error)}{free(temporary)}"
            ) from None
        buckets.upload(temporary, path)


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
    if text := buckets.problem(error):
        return text
    if isinstance(error, FileNotFoundError) and not error.errno:  # of the client of a bucket
        return "there is no such object"
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def free(path: Path) -> str:
    """ " (… MB free there)", the end of a message, or "" if the free space is not known."""
    space = _free_space(path)
    return "" if space is None else f" ({space / 1e6:.1f} MB free there)"


def check_writable(folder: Path, name: str) -> None:
    """Raise UserError if no file can be written in a folder. Leaves nothing there.

    If the folder does not exist, this checks the nearest existing one above it. name: the subject
    of the message. The test file has some bytes, since a full disk or quota accepts empty files.
    """
    if in_bucket(folder):
        buckets.check_writable(folder, name)
        return
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


def check_room(path: Path, size: int) -> None:
    """Raise UserError if `size` bytes do not fit on the disk of `path`, which need not exist."""
    space = _free_space(path)
    if space is not None and size > space:
        raise UserError(
            f"{path} could not be written: it takes {size / 1e6:.1f} MB, and {space / 1e6:.1f} MB "
            "are free there"
        )


def _free_space(path: Path) -> int | None:
    """Free bytes on the disk of a folder, or of a file's folder. Follows links."""
    if in_bucket(path):
        return None
    target = path.resolve()
    try:
        return shutil.disk_usage(target if target.is_dir() else path.parent.resolve()).free
    except OSError:
        return None


def passes(error: BaseException | None) -> bool:
    """Whether missing access, open files or memory, a failing disk or an unreachable bucket caused
    a read error.

    The file itself may be sound then.
    """
    return error is not None and any(
        isinstance(each, MemoryError)
        or buckets.problem(each)
        or (isinstance(each, OSError) and each.errno in PASSING)
        or any(text in str(each) for text in PASSING_TEXTS)
        for each in causes(error)
    )


def check_regular(path: str | os.PathLike) -> None:
    """Raise OSError if nothing exists at a path, or a pipe, a socket or a device, whose reading
    might never end. In a bucket there are only objects.
    """
    if in_bucket(path):
        return
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def read_json(path: Path) -> dict | None:
    """The JSON object in a file that this package wrote; None if the file does not exist.

    Raises DamagedError for any other content, UserError if the file cannot be read now.
    """
    try:
        check_regular(path)
        content = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except Exception as error:
        text = f"{path} cannot be read: {reason(error)}"
        if isinstance(error, OSError) or buckets.problem(error):
            raise UserError(text) from None
        if isinstance(error, (ValueError, RecursionError)):
            raise DamagedError(text) from None
        raise
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged, or was edited: expected a JSON object")
    return content


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(fetched(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local(path: str, kinds: str = "local files") -> str:
    """A path on this machine's file systems, with ~, ~USER, $NAME and ${NAME} replaced.

    kinds: what is allowed instead of a URL. Raises UserError for a URL and for an unknown user or
    variable.
    """
    # pathlib leaves one slash of a URL's two. tfds:/FOLDER is a prepared data set, not a URL.
    if re.match(rf"{URL}|(?!tfds:)[A-Za-z][A-Za-z0-9+.-]+:/", path):
        raise UserError(
            f"{path} is a URL, and mdt_jax reads and writes {kinds} here; mount it, or copy it"
        )
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded[:1] in ("~", "$"):
        what = "user" if expanded[0] == "~" else "environment variable"
        raise UserError(f"{path}: there is no {what} of this name; a file of this name is ./{path}")
    return expanded


def anywhere(path: str) -> str:
    """A path as of `local`, or of a bucket: gs://BUCKET/NAME, s3://BUCKET/NAME.

    Raises UserError for another URL and where the client of the bucket is not installed.
    """
    expanded = os.path.expandvars(path)
    if in_bucket(expanded):
        slash = "/" if expanded.endswith("/") else ""  # for --out it names a folder
        return f"{buckets.place(expanded)}{slash}"
    return local(path, "local files, gs:// and s3://")


def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is valid in the file system's encoding."""
    return not re.search("[\ud800-\udfff]", os.fspath(path))
