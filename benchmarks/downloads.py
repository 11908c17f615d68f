"""Files that a bench downloads: resumed, checked, and under their name only when they are whole."""

import http.client
import pathlib
import re
import urllib.request

from mdt_jax.runtime import hosts, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import file_sha256, reason
from mdt_jax.runtime.progress import progress_bar

MIB = 2**20


def download(url: str, folder: pathlib.Path, flag: str) -> str:
    """Fetch a file into a folder, unless it is there; returns its path.

    An interrupted download is continued from what FILE.part has. A name that ends in a hash,
    -0123abcd.pth, must be that of the content; other files are checked when they are read, by the
    checksums that .npz and .pt hold. flag: takes the file instead. Raises UserError.
    """
    path = folder / url.rpartition("/")[2]
    if path.exists():
        return str(path)
    part = path.with_name(f"{path.name}.part")
    with hosts.alone(locks.beside(path), str(path)):
        try:
            total = _fetch(url, part)
        except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
            if getattr(error, "code", None) == 416:  # the part is no beginning of this file
                part.unlink()
            raise UserError(
                f"{url} could not be downloaded: {reason(error)}; rerun to continue, or give the "
                f"file: --{flag}=FILE"
            ) from None
        if part.stat().st_size < total:
            raise UserError(f"{url}: the connection ended early; rerun to continue the download")
        stated = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
        digest = file_sha256(part) if stated else ""
        if stated and not digest.startswith(stated[1]):
            part.unlink()
            raise UserError(
                f"{url} was damaged in the download: its SHA-256 is {digest}, not {stated[1]}…; "
                "try again"
            )
        part.replace(path)
    return str(path)


def _fetch(url: str, part: pathlib.Path) -> int:
    """Download what a part lacks; returns the size of the whole file."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # the server gives no ranges
            done = 0
        total = done + int(response.headers["Content-Length"])
        name = part.name.removesuffix(".part")
        bar = progress_bar(-(-total // MIB), True, name, "MiB", initial=done // MIB)
        with open(part, "ab" if done else "wb") as file, bar as bar:
            while chunk := response.read(MIB):
                file.write(chunk)
                bar.update(1)
    return total
