"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping

import numpy as np

from mdt_jax.errors import UserError


@contextlib.contextmanager
def whole(
    path: str | os.PathLike, failures: tuple[type[Exception], ...] = ()
) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `path` when the block ends well; else nothing is left.

    failures: what the writer raises, besides OSError, where the disk is full. Raises UserError
    for these.
    """
    path = pathlib.Path(path)
    temporary = beside(path)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # some writers let nobody else read
        settle(temporary)
        os.replace(temporary, path)
    except (OSError, *failures) as error:
        raise UserError(f"{path} could not be written: {reason(error)}{free(path)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz, whole or not at all. Raises UserError where the disk is full."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        # NumPy's stub takes every keyword for its own `allow_pickle`, too.
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def settle(path: pathlib.Path) -> None:
    """Wait until a file is on the disk, so that a power cut cannot leave its name without it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by being set
    os.umask(mask)
    return mask


def beside(path: pathlib.Path) -> pathlib.Path:
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


def check_room(path: pathlib.Path, size: int) -> None:
    """Raise UserError where `size` bytes do not fit on the disk that `path` is to be on."""
    room = _room(path)
    if room is not None and size > room:
        raise UserError(
            f"{path} could not be written: it takes {size / 1e6:.1f} MB, and "
            f"{room / 1e6:.1f} MB are free there"
        )


def _room(path: pathlib.Path) -> int | None:
    try:
        return shutil.disk_usage(path.absolute().parent).free
    except OSError:
        return None
