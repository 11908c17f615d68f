"""Files of the Hugging Face hub, hf://OWNER/REPOSITORY[@REVISION][/FILE], and uploads to it."""

import contextlib
import functools
import http.client
import pathlib
import re
import time
import urllib.parse
import urllib.request
from typing import NamedTuple

from mdt_jax.runtime.errors import UserError, causes
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
from mdt_jax.runtime.progress import log

SCHEME = "hf://"
FORM = "hf://OWNER/REPOSITORY[@REVISION][/FILE]"
_PLACE = re.compile(
    r"hf://([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*))?", re.DOTALL
)
REMEMBERED = 60  # seconds for which it is remembered whether the hub answers
LOGIN = "log in (hf auth login) or set HF_TOKEN"


class Place(NamedTuple):
    """repository: OWNER/REPOSITORY. revision: a branch, tag or commit; None means the main branch.
    file: its path in the repository, or ""."""

    repository: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{urllib.parse.quote(self.revision, safe='')}"
        return f"{SCHEME}{self.repository}{revision}{self.file and '/'}{self.file}"


def parse(path: str) -> Place:
    """What hf://OWNER/REPOSITORY[@REVISION][/FILE] names; a slash in REVISION is written %2F, but
    in refs/pr/N and refs/convert/NAME. Raises UserError."""
    match = _PLACE.fullmatch(path)
    file = (match and match[3] or "").rstrip("/")
    if match is None or (file and {"", ".", ".."} & {*file.split("/")}):
        raise UserError(f"{path}: write {FORM}")
    return Place(match[1], match[2] and urllib.parse.unquote(match[2]), file)


def anywhere_or_hub(path: str) -> str:
    """A path as of `files.anywhere`, or hf://… unchanged. Raises UserError for another URL."""
    return path if path.startswith(SCHEME) else anywhere(path)


def local_path(path: str) -> Path:
    """The path itself; for hf://OWNER/REPOSITORY[@REVISION]/FILE the file in the hub's cache, for a
    file in a bucket a copy.

    Downloads the file where the cache lacks it; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE apply. Uses
    the cache alone where the hub does not answer within HF_HUB_ETAG_TIMEOUT seconds. Raises
    UserError where there is no such file or it cannot be downloaded, and for any other URL.
    """
    if in_bucket(path):
        return fetched(path) if is_file(path) else as_path(path)
    if not path.startswith(SCHEME):
        return pathlib.Path(anywhere(path))
    place = parse(path)
    if not place.file:
        raise UserError(f"{path}: write hf://OWNER/REPOSITORY[@REVISION]/FILE")
    try:
        return _download(path, place)
    except NoSuchFile as error:
        raise UserError(str(error)) from None


def optional_path(path: str) -> Path | None:
    """`local_path`; None where there is no such file, as far as the hub or its cache tells."""
    if not path.startswith(SCHEME):
        return local_path(path) if is_file(path) else None
    with contextlib.suppress(NoSuchFile):
        return _download(path, parse(path))
    return None


def at_commit(path: str) -> str:
    """hf://…/FILE at the commit that its revision is now. Downloads the file. Raises UserError."""
    place = parse(path)
    file = local_path(path)  # SNAPSHOTS/COMMIT/FILE
    return str(place._replace(revision=file.parents[place.file.count("/")].name))


def names(path: str) -> list[str]:
    """The files of a repository at a revision, by their paths in it.

    Where the hub cannot be asked, those that the cache has. Raises UserError where there is no such
    repository or revision, or neither the hub nor the cache has an answer.
    """
    import huggingface_hub
    from huggingface_hub import constants

    place, silent = parse(path), _prepare_client()
    try:
        if silent:
            raise TimeoutError
        api = huggingface_hub.HfApi()
        info = api.model_info(
            place.repository, revision=place.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        return sorted(sibling.rfilename for sibling in info.siblings or ())
    except Exception as error:  # any kind of the client, and of the libraries that it uses
        cached = _cached_names(place)
        if not cached:
            raise UserError(f"{path}{problem(error, place, silent)}") from None
        return cached


def _cached_names(place: Place) -> list[str]:
    """The files in the cache's snapshot of a revision, whose folders the hub documents."""
    from huggingface_hub import constants

    name = f"models--{place.repository.replace('/', '--')}"
    folder = pathlib.Path(constants.HF_HUB_CACHE) / name
    revision = place.revision or "main"
    with contextlib.suppress(OSError):
        if not re.fullmatch("[0-9a-f]{40}", revision):
            revision = (folder / "refs" / revision).read_text().strip()
        snapshot = folder / "snapshots" / revision
        files = (file for file in snapshot.rglob("*") if file.is_file())
        return sorted(file.relative_to(snapshot).as_posix() for file in files)
    return []


class NoSuchFile(UserError):
    """A repository, or the cache where the hub cannot be asked, does not have a file."""


def _download(path: str, place: Place) -> pathlib.Path:
    """The file in the cache, downloaded if need be. Raises UserError."""
    import huggingface_hub
    from huggingface_hub import errors

    started, silent = time.time(), _prepare_client()
    try:
        file = huggingface_hub.hf_hub_download(
            place.repository, place.file, revision=place.revision, local_files_only=silent
        )
    except Exception as error:  # any kind of the client, and of the libraries that it uses
        absent = isinstance(error, errors.EntryNotFoundError)
        kind = NoSuchFile if absent else UserError
        raise kind(f"{path}{problem(error, place, silent)}") from None
    _check_hash(path, pathlib.Path(file), started)
    return pathlib.Path(file)


def _prepare_client() -> bool:
    """Quiet the client, which reports each retry; returns whether the hub does not answer."""
    import huggingface_hub
    from huggingface_hub import constants

    huggingface_hub.logging.set_verbosity_error()
    offline, seconds = constants.HF_HUB_OFFLINE, constants.HF_HUB_ETAG_TIMEOUT
    return not offline and _is_silent(constants.ENDPOINT, seconds, time.monotonic() // REMEMBERED)


@functools.lru_cache(maxsize=1)
def _is_silent(url: str, seconds: float, _: float) -> bool:
    """Whether the hub does not answer in time. The client itself would retry for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", error), TimeoutError)
    return False


def problem(error: Exception, place: Place, silent: bool = False) -> str:
    """What an error of the client means: the end of a message that begins with the path."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if silent:
        return (
            " is not in the cache and the hub did not answer within "
            f"{constants.HF_HUB_ETAG_TIMEOUT} s; try again, or raise HF_HUB_ETAG_TIMEOUT"
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            " is not in the cache and the hub cannot be reached, or answers with an error; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f": the repository {place.repository} has no such file"
    if isinstance(error, errors.RevisionNotFoundError):
        return f": the repository {place.repository} has no revision {place.revision}"
    if isinstance(error, errors.GatedRepoError):
        url = f"{constants.ENDPOINT}/{place.repository}"
        return f": the repository is gated; accept its terms at {url}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        known = huggingface_hub.get_token() is not None
        owner = "your token does not give access to it" if known else f"it is private: {LOGIN}"
        return f": there is no such repository, or {owner}"
    if isinstance(error, errors.HFValidationError):
        return f": {error}"
    return f" could not be downloaded: {_said(error)}; try again"


def _said(error: Exception) -> str:
    """What the hub said, or else the error itself, in a line."""
    said = (getattr(each, "server_message", None) for each in causes(error))
    return next((text.splitlines()[0][:200] for text in said if text), reason(error))


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


def check_uploadable(path: str) -> Place:
    """The repository that hf://OWNER/REPOSITORY[@REVISION] names.

    Raises UserError where the client is offline or the hub does not answer, and without a login.
    """
    import huggingface_hub
    from huggingface_hub import constants

    place = parse(path)
    if place.file:
        raise UserError(f"{path}: write hf://OWNER/REPOSITORY[@REVISION], without a file")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{path}: nothing can be uploaded while HF_HUB_OFFLINE is set")
    if huggingface_hub.get_token() is None:
        raise UserError(f"{path}: to upload, {LOGIN}")
    if _prepare_client():
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        raise UserError(f"{path}: the hub did not answer within {seconds} s; try again")
    return place


def upload(path: str, folder: pathlib.Path, public: bool, message: str) -> tuple[str, bool]:
    """Add the files of a folder to a repository in one commit, and make the repository if there is
    none. Its other files stay, and so does who may see it, if there is one.

    path: as `check_uploadable` takes it; a branch that does not exist is made. public: of a new
    repository. message: the commit's. Returns (the address of the commit, whether the repository is
    public). Raises UserError.
    """
    import huggingface_hub
    from huggingface_hub import utils

    place, api = parse(path), huggingface_hub.HfApi()
    files = sorted(folder.iterdir())
    add = [huggingface_hub.CommitOperationAdd(file.name, str(file)) for file in files]
    log(f"uploading {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB to {path}")
    shown = not utils.are_progress_bars_disabled()
    if shown:  # the client's bars count what is repeated, and outlive an error
        utils.disable_progress_bars()
    try:
        api.create_repo(place.repository, private=not public, exist_ok=True)
        if place.revision is not None:
            api.create_branch(place.repository, branch=place.revision, exist_ok=True)
        is_public = not api.model_info(place.repository).private
        commit = api.create_commit(
            place.repository, add, commit_message=message, revision=place.revision
        )
    except Exception as error:  # any kind of the client, and of the libraries that it uses
        raise UserError(f"{path}{_upload_problem(error, place)}") from None
    finally:
        if shown:
            utils.enable_progress_bars()
    return commit.commit_url, is_public


def _upload_problem(error: Exception, place: Place) -> str:
    """`problem` of an upload."""
    from huggingface_hub import constants, errors

    responses = (getattr(each, "response", None) for each in causes(error))
    status = next((each.status_code for each in responses if each is not None), None)
    if isinstance(error, (errors.HFValidationError, errors.RevisionNotFoundError)):
        return problem(error, place)
    if status == 401:
        return f": the hub does not accept the token; {LOGIN}"
    if status == 403:
        return (
            f": the token may not write there ({_said(error)}); take one with the permission to "
            f"write, {constants.ENDPOINT}/settings/tokens"
        )
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f" could not be uploaded: {_said(cause)}; the same command tries again"
