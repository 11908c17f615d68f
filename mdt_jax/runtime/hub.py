"""Files of the Hugging Face hub: hf://OWNER/REPOSITORY/FILE, and copies of those in buckets."""

import http.client
import pathlib
import re
import time
import urllib.request

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import (
    Path,
    anywhere,
    as_path,
    fetched,
    file_sha256,
    in_bucket,
    is_file,
    reason,
)

SCHEME = "hf://"


def anywhere_or_hub(path: str) -> str:
    """A path as of `files.anywhere`, or hf://… unchanged. Raises UserError for another URL."""
    return path if path.startswith(SCHEME) else anywhere(path)


def local_path(path: str) -> Path:
    """The path itself; for hf://OWNER/REPOSITORY/FILE the file in the hub's cache, for a file in a
    bucket a copy.

    Downloads the file where the cache lacks it; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE apply. Uses
    the cache alone where the hub does not answer within HF_HUB_ETAG_TIMEOUT seconds. Raises
    UserError where there is no such file or it cannot be downloaded, and for any other URL.
    """
    if in_bucket(path):
        return fetched(path) if is_file(path) else as_path(path)
    if not path.startswith(SCHEME):
        return pathlib.Path(anywhere(path))
    owner, _, rest = path.removeprefix(SCHEME).partition("/")
    repository, _, name = rest.partition("/")
    if not (owner and repository and name):
        raise UserError(f"{path}: write hf://OWNER/REPOSITORY/FILE")
    import huggingface_hub
    from huggingface_hub import constants

    repository, started, silent = f"{owner}/{repository}", time.time(), False
    huggingface_hub.logging.set_verbosity_error()  # or it reports each retry, twice
    try:
        url = huggingface_hub.hf_hub_url(repository, name)
        silent = not constants.HF_HUB_OFFLINE and _is_silent(url, constants.HF_HUB_ETAG_TIMEOUT)
        file = huggingface_hub.hf_hub_download(repository, name, local_files_only=silent)
    except Exception as error:  # any kind of the client, and of the libraries that it uses
        raise UserError(f"{path}{_problem(error, repository, silent)}") from None
    _check_hash(path, pathlib.Path(file), started)
    return pathlib.Path(file)


def _is_silent(url: str, seconds: float) -> bool:
    """Whether the hub does not answer in time. The client itself would retry for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", error), TimeoutError)
    return False


def _problem(error: Exception, repository: str, silent: bool) -> str:
    """The end of a message that begins with the path."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and silent:
        return (
            " is not in the cache and the hub did not answer within "
            f"{constants.HF_HUB_ETAG_TIMEOUT} s; try again, or raise HF_HUB_ETAG_TIMEOUT"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            " is not in the cache and the hub cannot be reached, or answers with an error; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f": the repository {repository} has no such file"
    if isinstance(error, errors.RepositoryNotFoundError):
        return ": there is no such repository, or it requires a login"
    if isinstance(error, errors.HFValidationError):
        return f": {error}"
    return f" could not be downloaded: {reason(error)}; try again"


def _check_hash(path: str, file: pathlib.Path, started: float) -> None:
    """Raise UserError, and remove the file, where a new download does not have the hub's SHA-256.

    The cache names large files by the hash that the hub sent with them.
    """
    blob = file.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < started:
        return
    digest = file_sha256(blob)
    if digest != blob.name:
        file.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{path} was damaged in the download: its SHA-256 is {digest}, not {blob.name}; "
            "try again"
        )
