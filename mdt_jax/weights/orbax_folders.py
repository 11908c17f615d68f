"""Folders of arrays in Orbax's format, with checksums that prove their bits unchanged.

A folder holds items (trees of arrays by name) and `meta` (JSON, with checksums of the items and of
itself). A run has one for each step that it saved; see `step_folders`.
"""

import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mdt_jax.runtime import buckets, hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import (
    Path,
    absolute,
    check_regular,
    check_room,
    exists,
    file_sha256,
    free,
    in_bucket,
    is_dir,
    is_file,
    names_in,
    passes,
    reason,
)
from mdt_jax.runtime.progress import log
from mdt_jax.weights.step_folders import (
    FOLDER,
    STEP,
    check_arrays_possible,
    check_path,
    is_saved,
    steps_of,
    unfinished_steps,
)

FORMAT = 1  # of a step's folder; this version cannot read newer ones
ORBAX_FILES = 1_000_000  # bytes that a folder needs besides its arrays, at most
SUM = "sha256"  # the key in `meta` of the checksum of its other entries, in every format
# Files that Orbax itself leaves in a folder.
ORBAX_MARKS = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt"}
Read = TypeVar("Read")
# From a folder's meta: the name of an item, and its tree of shapes.
Choose = Callable[[dict], tuple[str, dict]]


class DamagedFolder(Exception):
    """A folder does not hold what was saved; the message says why."""


# --- Writing


def save_folder(folder: str | os.PathLike, item: str, arrays: dict, meta: dict) -> None:
    """Write one item as a folder of its own, with its meta; whole or not at all.

    Raises UserError where it cannot be written, for example on a full disk.
    """
    quiet()
    check_path(folder)
    folder = absolute(folder)
    check_arrays_possible(folder)
    try:
        with writing(folder, arrays), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            orbax.save(folder, sealed({item: arrays}, meta))
    except UserError:
        _remove_unfinished(folder)
        raise


@contextlib.contextmanager
def writing(path: Path, arrays: object = ()) -> Iterator[None]:
    """Raise UserError where there is no room for the arrays, and for any error of Orbax."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    check_room(path, size + ORBAX_FILES if size else 0)
    try:
        yield
    except Exception as error:
        if hosts.may_be_lost(error):
            raise
        raise UserError(f"{path} could not be written: {reason(error)}{free(path)}") from None


def sealed(items: dict[str, Any], meta: dict) -> ocp.args.Composite:
    """What Orbax is to save: the items, and the meta with their checksums and its own."""
    checksums = {name: int(_checksum(tree)) for name, tree in items.items()}
    meta = {"format": FORMAT, "step": 0, "checksums": checksums, **meta}
    meta[SUM] = meta_sha256(meta)
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args)


@jax.jit
def _checksum(tree) -> jax.Array:
    """A uint32 of all bits of a tree, computed where its arrays are; independent of sharding."""
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total += jnp.uint32(2 * number + 1) * words.sum(dtype=jnp.uint32)
    return total


def meta_sha256(meta: dict) -> str:
    """SHA-256 of all entries of a meta but its own checksum."""
    rest = {name: value for name, value in meta.items() if name != SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _remove_unfinished(folder: Path) -> None:
    """Remove the files of a failed save, to which Orbax may still be writing."""
    if in_bucket(folder):
        with contextlib.suppress(Exception):  # perhaps the reason why the save failed
            buckets.remove_folder(folder)
        return
    for _ in range(50):
        unfinished = list(folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"))
        if not unfinished:
            return
        for path in unfinished:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


# --- Reading


def load_item(path: str | os.PathLike, choose: Choose) -> tuple[dict, dict]:
    """(arrays, meta) of one item; of a run, from its newest step that is not damaged.

    path: a workdir, its checkpoints folder, one step of it, or a folder of `save_folder`. Raises
    UserError where the path does not exist, or holds no such item that can be read.
    """
    root = absolute(path)
    if not str(path) or not exists(root):
        buckets.check_bucket(root)
        raise UserError(f"checkpoint '{path}' does not exist")
    if is_file(root):
        raise UserError(f"{path} is neither the folder of a run nor a file of weights")
    check_path(root)
    check_arrays_possible(root)
    _check_is_ours(root)
    read = functools.partial(_read_item, choose=choose)
    if is_saved(root):
        try:
            return read_sound(root, read)
        except DamagedFolder as error:
            raise UserError(f"checkpoint {path} is damaged: {error}") from None
    directory = root / FOLDER if is_dir(root / FOLDER) else root
    unfinished = unfinished_steps(directory)
    newest, _ = newest_sound(directory, read)
    if unfinished and (newest is None or unfinished[0] > newest[1]["step"]):
        log(f"{directory / str(unfinished[0])} is not finished, and is passed over")
    if newest is None:
        raise UserError(f"{path} holds no checkpoint: expected a workdir that was trained in")
    return newest


def newest_sound(directory: Path, read: Callable[[Any], Read]) -> tuple[Read | None, list[int]]:
    """read(folder) of the newest step that can be read, and the damaged newer steps.

    Returns (None, []) where there is no step at all; raises UserError where none can be read.
    """
    damaged = []
    for step in steps_of(directory):
        folder = directory / str(step)
        try:
            return read_sound(folder, read), damaged
        except DamagedFolder as error:
            damaged.append(step)
            log(f"checkpoint {folder} is damaged: {error}")
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {directory} can be read; restore "
            "one from a backup, or train anew in another workdir"
        )
    return None, damaged


def read_sound(folder: Path, read: Callable[[Any], Read]) -> Read:
    """read(folder). Raises DamagedFolder, or UserError where `read` does."""
    try:
        return read(folder)
    except UserError:
        raise
    except Exception as error:  # Orbax raises many kinds for a damaged folder
        check_readable(folder, error)
        raise DamagedFolder(reason(error)) from None


def _read_item(folder: Path, choose: Choose) -> tuple[dict, dict]:
    """(arrays, meta) of one folder, on this process's first device."""
    meta = read_meta(folder)
    item, shapes = choose(meta)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
    )
    return restore(folder, {item: abstract})[item], meta


def read_meta(folder: Path) -> dict:
    """The JSON of a folder: config, step, checksums and the times of the run.

    Raises ValueError where it is damaged, and UserError where a newer mdt_jax has written it in a
    format that this version does not know.
    """
    for path in () if in_bucket(folder) else _files_in(folder):
        check_regular(path)  # Orbax would wait for a pipe
    with _reader() as checkpointer:
        meta = checkpointer.restore(folder, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if SUM in meta and meta[SUM] != meta_sha256(meta):  # the oldest have no checksum
        raise ValueError("its meta is not what was saved")
    is_step = folder.parent.name == FOLDER and STEP.fullmatch(folder.name)
    if is_step and int(folder.name) != meta["step"]:
        raise ValueError(f"its meta is of step {meta['step']}")
    if meta.get("format", 1) > FORMAT:
        raise UserError(
            f"checkpoint {folder} is of format {meta['format']}, newer than the {FORMAT} that this "
            "mdt_jax knows: install a newer one"
        )
    return meta


def restore(folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """The items of a folder, and its meta.

    items: abstract trees by name. Raises ValueError if bits have changed.
    """
    args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    error = None
    try:
        with _reader() as checkpointer:
            restored = checkpointer.restore(
                folder, ocp.args.Composite(meta=ocp.args.JsonRestore(), **args)
            )
    except Exception as raised:  # Orbax raises many kinds for a damaged folder
        error = raised
    # A checksum is a collective: no process may begin one if another could not read its part.
    if not hosts.all_hosts(error is None, f"checkpoint {folder.name}"):
        raise error or ValueError("another process cannot read it")
    for name in items:
        if int(_checksum(restored[name])) != restored["meta"]["checksums"][name]:
            raise ValueError(f"the values of {name} are not those that were saved")
    return restored


def _reader() -> ocp.Checkpointer:
    """An Orbax reader for this process alone.

    By default Orbax synchronises the processes, and waits for those that failed to read and left.
    """
    quiet()
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)


def check_readable(folder: Path, error: Exception) -> None:
    """Raise UserError where a folder may be sound and only cannot be read at the moment.

    error: what reading it raised. Every file is tried, because Orbax reports files that cannot be
    opened as missing.
    """

    def raise_if_passing(raised: OSError) -> None:
        if passes(raised):
            raise raised

    try:
        for path in () if in_bucket(folder) else _files_in(folder, raise_if_passing):
            check_regular(path)
            file_sha256(path)
    except OSError as raised:
        error = raised
    if passes(error):
        raise UserError(
            f"checkpoint {folder} cannot be read just now: {reason(error)}; nothing was moved, "
            "rerun the same command to try again"
        ) from None


def _files_in(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[str]:
    for place, _, names in os.walk(folder, onerror=onerror):
        for name in names:
            yield os.path.join(place, name)


def _check_is_ours(root: Path) -> None:
    """Raise UserError for a folder, or one with steps, that another program wrote with Orbax."""
    for folder in (root, *(root / str(step) for step in steps_of(root))):
        names = {*names_in(folder)}
        if names & ORBAX_MARKS and not names & {"meta", "params", "ema", "progress"}:
            items = sorted(name for name in names if "." not in name and name not in ORBAX_MARKS)
            content = "arrays alone" if "_METADATA" in names else ", ".join(items[:3])
            raise UserError(
                f"{folder} is an Orbax checkpoint of another program: it holds {content}, not the "
                "params, ema, progress and meta of a run"
            )


# --- Orbax's own messages


def quiet() -> None:
    """Silence Orbax's log of saves and leftovers, and its tracebacks of errors it raises anyway.

    A log that the user asked for, with --verbosity=1, stays.
    """
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if logger.level in (logging.NOTSET, logging.WARNING):
            logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_unraisable_of_orbax
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _ignore_unraisable_of_orbax(unraisable) -> None:
    """When one read or write fails, the others under way end later, each with a message."""
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in pathlib.Path(code.co_filename).parts
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
