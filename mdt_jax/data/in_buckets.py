"""Data in buckets: how to copy what is not read in place, and errors that damage no record."""

import os
import shlex

from mdt_jax.runtime import buckets, files
from mdt_jax.runtime.errors import UserError

COPY = {"gs": ("gcloud storage cp", "-r"), "s3": ("aws s3 cp", "--recursive")}


def copy_command(path: str | os.PathLike, folder: bool = True) -> str:
    """The command that copies a folder or an object to this machine, quoted for a shell."""
    command, recursive = COPY[buckets.scheme(path)]
    url = str(path).rstrip("/")
    url, name = shlex.quote(url), shlex.quote(os.path.basename(url))
    return f"{command} {recursive} {url} {name}" if folder else f"{command} {url} {name}"


def check_array_record(path: str | os.PathLike) -> None:
    """Raise UserError for a folder of ArrayRecord files in s3://, which ArrayRecord cannot read."""
    if buckets.scheme(path) == "s3":
        raise UserError(
            f"{path}: ArrayRecord files are read from disks and from gs://, not from s3://; copy "
            f"the folder: {copy_command(path)}"
        )


def unreached(error: Exception) -> str:
    """Why the C++ client of gs:// in ArrayRecord gave no record, in a line; "" where it gave one.

    The client has tried again for minutes before it raises an error.
    """
    return files.reason(error) if "reading gs://" in str(error) else ""
