"""Files of the Hugging Face hub: hf://OWNER/REPOSITORY/FILE."""

import hashlib
import http.client
import pathlib
import re
import time
import urllib.request

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import local, reason

SCHEME = "hf://"


def on_disk(path: str) -> str:
    """A path as of `files.local`, or hf://… as it is. Raises UserError for another URL."""
    return path if path.startswith(SCHEME) else local(path)


def local_path(path: str) -> pathlib.Path:
    """The file itself, or for hf://OWNER/REPOSITORY/FILE where the hub's cache has it.

    Downloads what the cache lacks; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are honoured. A hub that
    does not answer within HF_HUB_ETAG_TIMEOUT seconds is not waited for. Raises UserError where
    the file cannot be had, and for any other URL.
    """
    if not path.startswith(SCHEME):
        return pathlib.Path(local(path))
    owner, _, rest = path.removeprefix(SCHEME).partition("/")
    repository, _, name = rest.partition("/")
    if not (owner and repository and name):
        raise UserError(f"{path}: write hf://OWNER/REPOSITORY/FILE")
    import huggingface_hub
    from huggingface_hub import constants, errors

    started = time.time()
    huggingface_hub.logging.set_verbosity_error()  # else it tells of each retry, twice
    repository = f"{owner}/{repository}"
    silent = False
    try:
        url = huggingface_hub.hf_hub_url(repository, name)
        silent = not constants.HF_HUB_OFFLINE and _is_silent(url, constants.HF_HUB_ETAG_TIMEOUT)
        found = pathlib.Path(
            huggingface_hub.hf_hub_download(repository, name, local_files_only=silent)
        )
        _check_hash(path, found, started)
        return found
    except errors.LocalEntryNotFoundError:
        if silent:
            raise UserError(
                f"{path} is not in the cache and the hub did not answer within "
                f"{constants.HF_HUB_ETAG_TIMEOUT} s; try again, or raise HF_HUB_ETAG_TIMEOUT"
            ) from None
        raise UserError(
            f"{path} is not in the cache and the hub cannot be reached, or answers with an error; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(f"{path}: the repository {repository} has no such file") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{path}: there is no such repository, or it asks for a login") from None
    except errors.HFValidationError as error:
        raise UserError(f"{path}: {error}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the client and what it is built on make of a network
        raise UserError(f"{path} could not be downloaded: {reason(error)}; try again") from None


def _is_silent(url: str, seconds: float) -> bool:
    """Whether nothing answers within so many seconds. The client would ask again for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", error), TimeoutError)
    return False


def _check_hash(path: str, found: pathlib.Path, started: float) -> None:
    """Raise UserError, and drop the file, where what was just downloaded has another SHA-256.

    The cache names large files by the hash that the hub gave for them.
    """
    blob = found.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < started:
        return
    with open(blob, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        found.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{path} was not downloaded as it should be: its SHA-256 is {digest}, not {blob.name}; "
            "try again"
        )
