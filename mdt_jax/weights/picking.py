"""Which file of a folder or a repository holds its weights."""

import os
from collections.abc import Sequence

from mdt_jax.runtime import files, hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import step_folders, torch_files

OURS = "model.safetensors"  # what `convert` uploads
CONFIG = "config.json"  # what a network is, beside its file
DIFFUSERS = "diffusion_pytorch_model"
# The names that are looked for, in this order.
NAMES = (
    OURS, f"model{torch_files.INDEX}", f"{DIFFUSERS}.safetensors",
    f"{DIFFUSERS}{torch_files.INDEX}", f"{DIFFUSERS}.bin", f"{DIFFUSERS}.fp16.safetensors",
)  # fmt: skip
SHOWN = 10  # files in a message


def pick(names: Sequence[str], kind: str | None, place: str) -> str:
    """The file of weights among the files of a folder or repository.

    Of NAMES the first that is there, else the first in the subfolder transformer/, for a VAE vae/,
    else the only file outside subfolders with one of `torch_files.SUFFIXES`.

    names: relative paths. kind: the key in `kinds.KINDS` of the network, or None. place: the
    folder or repository, for messages. Raises UserError, with the files there are.
    """
    subfolder = "vae" if kind == "vae" else "transformer"
    for name in (*NAMES, *(f"{subfolder}/{name}" for name in NAMES)):
        if name in names:
            return name
    weights = [n for n in names if n.endswith(torch_files.SUFFIXES) and "-of-" not in n]  # no shard
    top = [name for name in weights if "/" not in name]
    if len(top) == 1:
        return top[0]
    shown = weights or names
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    there = f"{', '.join(shown[:SHOWN])}{more}" if shown else "no file"
    hint = f"; append one, as in {place}/{weights[0]}" if weights else ""
    raise UserError(f"{place} has no {OURS} and no {DIFFUSERS}.safetensors, but {there}{hint}")


def resolve(path: str, kind: str | None = None) -> str:
    """The path of the file of weights that a path names; other paths unchanged, as of a run.

    path: hf://OWNER/REPOSITORY[@REVISION][/FOLDER or /FILE], or a folder, on a disk or in a bucket,
    that holds files of weights. Fetches the file from the hub or a bucket, with the config.json
    beside it; a path on the hub is then at its present commit, so that all files are of one.
    Raises UserError.
    """
    if path.startswith(hub.SCHEME):
        place = hub.parse(path)
        if not torch_files.is_weights(place.file):
            path = str(place._replace(file=_file_of(place, hub.names(path), kind)))
        path = hub.at_commit(path)
    elif files.is_dir(path) and not _is_ours(path):
        names = _names_in(path)
        if not any(torch_files.is_weights(name) for name in names):
            return path
        path = os.path.join(path, pick(names, kind, path))
    elsewhere = path.startswith(hub.SCHEME) or files.in_bucket(path)
    if elsewhere and torch_files.is_weights(path):
        hub.optional_path(f"{path.rpartition('/')[0]}/{CONFIG}")
    return path


def _file_of(place: hub.Place, names: Sequence[str], kind: str | None) -> str:
    """The file of a place that may be a file of another kind, a folder or a whole repository."""
    if place.file in names:
        return place.file
    start = place.file and f"{place.file}/"
    inside = [name.removeprefix(start) for name in names if name.startswith(start)]
    if start and not inside:
        raise UserError(f"{place}: the repository {place.repository} has no such file")
    return start + pick(inside, kind, str(place))


def _is_ours(folder: str) -> bool:
    """Whether a folder is of a run, or of `networks.save`."""
    checkpoints = files.as_path(folder) / step_folders.FOLDER
    return (
        step_folders.is_saved(folder)
        or files.is_dir(checkpoints)
        or bool(step_folders.steps_of(files.as_path(folder)))
    )


def _names_in(folder: str) -> list[str]:
    """The names in a folder, and in the subfolders in which `pick` looks."""
    place = files.as_path(folder)
    names = sorted(files.names_in(place))
    for subfolder in ("transformer", "vae"):
        if subfolder in names:
            names += sorted(f"{subfolder}/{name}" for name in files.names_in(place / subfolder))
    return names
