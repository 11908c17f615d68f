"""Errors of ArrayRecord's C++ client of gs://, told from damaged records."""

from mdt_jax.runtime.files import reason


def unreached(error: Exception) -> str:
    """Why a bucket gave no record, in a line; "" where it did, so that the record is damaged.

    The client has tried again for minutes before it raises the former.
    """
    return reason(error) if "reading gs://" in str(error) else ""
