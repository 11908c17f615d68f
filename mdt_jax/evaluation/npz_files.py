"""Arrays of an npz file, and what their headers say without reading them."""

import os
import zipfile
from typing import NamedTuple

import numpy as np

from mdt_jax.data.sample_notes import read_header
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular, reason


class Header(NamedTuple):
    """Of an array in an npz file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def read_headers(path: str | os.PathLike) -> dict[str, Header]:
    """The headers of all arrays of an npz file, by name. Raises UserError."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            headers = {}
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        headers[name.removesuffix(".npy")] = Header(*read_header(file))
            return headers
    except Exception as error:  # NumPy and zipfile raise many kinds for damaged files
        raise UserError(f"{path} could not be read: {reason(error)}") from None


def read_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """One array of an npz file. Raises UserError."""
    try:
        with np.load(path) as arrays:
            return arrays[name]
    except Exception as error:  # NumPy and zipfile raise many kinds for damaged files
        raise UserError(f"{path}: {name} could not be read: {reason(error)}") from None
