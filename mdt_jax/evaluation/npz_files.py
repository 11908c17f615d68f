"""Arrays of an npz file, and what their headers say without reading them."""

import contextlib
import os
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mdt_jax.data.sample_notes import read_header
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular, fetched, reason


class Header(NamedTuple):
    """Of an array in an npz file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


@contextlib.contextmanager
def reading(name: str | os.PathLike) -> Iterator[None]:
    """Raise UserError for whatever reading a damaged file raises in the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, NumPy and Pillow raise many kinds
        raise UserError(f"{name} could not be read: {reason(error)}") from None


def read_headers(path: str | os.PathLike) -> dict[str, Header]:
    """The headers of all arrays of an npz file, by name. Raises UserError."""
    headers = {}
    with reading(path):
        check_regular(path)
        with zipfile.ZipFile(fetched(path)) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        headers[name.removesuffix(".npy")] = Header(*read_header(file))
    return headers


def read_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """One array of an npz file. Raises UserError."""
    with reading(f"{path}: {name}"), np.load(fetched(path)) as arrays:
        return arrays[name]
