"""Objects in buckets: gs:// through gcsfs, s3:// through s3fs.

A bucket has no folders: a folder is the common beginning of some names. One object is written whole
or not at all; several are not, and none can be renamed.
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import importlib
import logging
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from mdt_jax.runtime.errors import UserError, causes

# Scheme → the package that speaks its protocol, and our extra that installs it.
CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# The modules whose errors are theirs.
LIBRARIES = re.compile(
    r"(aiobotocore|aiohttp|botocore|gcsfs|google\.(api_core|auth|cloud)|requests|s3fs)\b"
)
REFUSED = re.compile("Forbidden: |Bad Request: ")
PROBE = ".write-test"  # what `check_writable` writes and removes, perhaps in several processes
THREADS = 16  # requests at a time


def scheme(path: str | os.PathLike) -> str:
    """ "gs" or "s3"; "" for a path that is not in a bucket."""
    name, separator, _ = os.fspath(path).partition("://")
    return name if separator and name in CLIENTS else ""


def place(url: str) -> epath.Path:
    """The path of gs://BUCKET/NAME or s3://BUCKET/NAME.

    Raises UserError where the URL names no bucket, where the client is not installed, and for a #
    in the name: gcsfs, TensorStore and ArrayRecord each take what follows for something else.
    """
    protocol = scheme(url)
    bucket, _, name = url.removeprefix(f"{protocol}://").partition("/")
    parts = name.rstrip("/").split("/") if name else []
    if not bucket or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{url}: write {protocol}://BUCKET/NAME")
    if "#" in name:
        raise UserError(f"{url}: a name in a bucket cannot have a #; choose another one")
    _load(protocol)
    return epath.Path(f"{protocol}://{'/'.join([bucket, *parts])}")


@functools.cache
def _load(protocol: str) -> None:
    """Import and configure the client of a scheme. Raises UserError where it is not installed."""
    package, extra = CLIENTS[protocol]
    # Plain buckets only: otherwise gcsfs asks for the kind of each bucket, which needs permission.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        from fsspec.config import conf

        importlib.import_module(package)
    except ImportError:
        raise UserError(f"{protocol}:// needs {package}: pip install -e '.[{extra}]'") from None
    # Other processes write there, too; a client's list of objects would soon be out of date.
    conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    for name in (package, "google"):  # they print tracebacks of what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)


def client(path: str | os.PathLike) -> Any:
    """The fsspec file system of a path in a bucket."""
    protocol = scheme(path)
    _load(protocol)
    import fsspec

    return fsspec.filesystem(protocol)


def bucket_of(path: str | os.PathLike) -> str:
    """gs://BUCKET or s3://BUCKET of a path there."""
    protocol, _, name = os.fspath(path).partition("://")
    return f"{protocol}://{name.partition('/')[0]}"


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn the errors of a bucket's client, but for FileNotFoundError, into a UserError that names
    the path. Those of a disk are kept.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # of many kinds, by client
        text = problem(error) if scheme(path) else ""
        if not text:
            raise
        raise UserError(f"{path} cannot be read: {text}") from error


def kind(path: str | os.PathLike) -> str:
    """ "file" for an object, "directory" for a folder with objects, "" for neither.

    epath's own `exists` and `is_dir` take an object that cannot be reached for one that is missing.
    """
    try:
        with reading(path):
            return client(path).info(str(path))["type"]
    except FileNotFoundError:
        return ""


def check_bucket(path: str | os.PathLike) -> None:
    """Raise UserError if a path where nothing was found is in a bucket that does not exist."""
    if scheme(path) and not kind(bucket_of(path)):
        raise UserError(f"{path} cannot be read: there is no bucket {bucket_of(path)}")


def names(folder: str | os.PathLike) -> list[str]:
    """The names of the objects and folders in a folder, without PROBE; [] where there is none."""
    try:
        with reading(folder):
            paths = client(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    _, _, own = str(folder).partition("://")  # some programs make an object for a folder itself
    inside = {path.rstrip("/") for path in paths} - {own}
    return sorted({path.rpartition("/")[2] for path in inside} - {PROBE})


def upload(file: pathlib.Path, path: str | os.PathLike) -> None:
    """Write a local file as one object, which has its name once all its bytes are there.

    Raises UserError.
    """
    try:
        client(path).put_file(str(file), str(path))
    except Exception as error:  # of many kinds, by client
        raise UserError(f"{path} could not be written: {problem(error) or error}") from None


def remove(path: str | os.PathLike) -> None:
    """Remove an object, unless there is none."""
    with contextlib.suppress(FileNotFoundError):
        client(path).rm_file(str(path))


def remove_folder(folder: str | os.PathLike) -> None:
    """Remove all objects in a folder, unless there are none."""
    objects = client(folder).find(str(folder))  # its own recursive `rm` takes * and ? for patterns
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: remove(f"{scheme(folder)}://{name}"), objects))


_versions: dict[pathlib.Path, object] = {}  # copy → the version of its object


@functools.cache
def _scratch() -> pathlib.Path:
    """A folder for copies of objects, which the process removes at its end."""
    folder = tempfile.mkdtemp(prefix="mdt_jax-")
    process = os.getpid()

    def clear():
        if os.getpid() == process:  # not in a forked worker
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clear)
    return pathlib.Path(folder)


def fetched(path: str | os.PathLike) -> pathlib.Path:
    """A local copy of an object as it is now, which exists as long as this process.

    Raises FileNotFoundError.
    """
    path = epath.Path(path)
    with reading(path):
        info = client(path).info(str(path))
    if info["type"] == "directory":
        raise FileNotFoundError(errno.ENOENT, "it is a folder", str(path))
    version = info.get("generation") or info.get("ETag")
    # The copies of one folder lie in one, as some formats need two files.
    folder = _scratch() / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]
    copy = folder / path.name
    if _versions.get(copy) != version:
        folder.mkdir(exist_ok=True)
        partial = folder / secrets.token_hex(8)
        with reading(path):
            client(path).get_file(str(path), str(partial))
        partial.replace(copy)
        _versions[copy] = version
    return copy


def check_writable(folder: str | os.PathLike, name: str) -> None:
    """Raise UserError where no object can be written in a folder. Leaves nothing there.

    name: the subject of the message.
    """
    if bucket_of(folder).endswith("://"):  # the folder of what the user has called gs://NAME
        raise UserError(f"{name} cannot be written to: write {folder}BUCKET/NAME")
    probe, written = epath.Path(folder) / PROBE, False
    try:
        client(probe).pipe_file(str(probe), b"mdt_jax")
        written = True
        remove(probe)
    except FileNotFoundError:
        raise UserError(
            f"{name} cannot be written to: there is no bucket {bucket_of(folder)}"
        ) from None
    except Exception as error:  # of many kinds, by client
        problem_ = problem(error) or error
        what = f"objects can be written, but not removed ({probe}): " if written else ""
        raise UserError(f"{name} cannot be written to: {what}{problem_}") from None


def check_deletable(folder: str | os.PathLike, name: str) -> None:
    """Raise UserError where Orbax could not delete checkpoints in a folder of gs://.

    Orbax asks for the bucket's metadata first, with another client than gcsfs.
    """
    from google.cloud import storage

    bucket = bucket_of(folder)
    try:
        storage.Client().get_bucket(bucket.removeprefix("gs://"))
    except Exception as error:  # of many kinds
        raise UserError(
            f"{name} cannot be used: Orbax reads the metadata of {bucket} before it deletes a "
            "checkpoint, which needs the permission storage.buckets.get (the role "
            f"storage.legacyBucketReader has it): {problem(error) or error}"
        ) from None


def problem(error: BaseException) -> str:
    """What the client of a bucket says is wrong, in a line; "" for other errors."""
    for each in causes(error):
        text = str(each).strip()
        theirs = LIBRARIES.match(type(each).__module__)
        # gcsfs raises these as Python's own errors.
        if theirs or (type(each) in (OSError, ValueError) and REFUSED.match(text)):
            lines = [line for line in text.splitlines() if line] or [type(each).__name__]
            denied = re.search(r"\b(?:401|403|[Ff]orbidden|denied)\b|credentials", text)
            hint = "; check the credentials and permissions of this machine" if denied else ""
            return f"{' '.join(lines)[:300]}{hint}"
    return ""
