"""A folder of arrays that Orbax writes and reads, whose bits are known to be those that were saved.

It holds items (trees of arrays by name) and `meta` (JSON, with their checksums and its own). It
gets its final name only when all of it is written.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular, check_room, free, is_text, passes, reason
from mdt_jax.runtime.progress import log

FOLDER = "checkpoints"
FORMAT = 1  # of a step folder; a newer one is not for this code
ORBAX_FILES = 1_000_000  # bytes that a step takes besides its arrays, generously
SUM = "sha256"  # in `meta`: of all else in it; so in every format, newer ones included
STEP = re.compile("0|[1-9][0-9]*")  # what a step's folder is called
Read = TypeVar("Read")
# Files that Orbax itself leaves in a folder that it writes.
ORBAX_MARKS = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt"}


@jax.jit
def _checksum(tree) -> jax.Array:
    """A uint32 of all bits of a tree, on the devices where it lies; independent of the sharding."""
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total += jnp.uint32(2 * number + 1) * words.sum(dtype=jnp.uint32)
    return total


def _reader() -> ocp.Checkpointer:
    """Each process reads by itself: by default Orbax has those that could wait for those that could
    not, which have left already."""
    quiet()
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)


def restore(folder: pathlib.Path, items: dict[str, Any]) -> dict[str, Any]:
    """Restore items (abstract trees by name) of a step folder; ValueError if bits have changed."""
    args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    error = None
    try:
        with _reader() as checkpointer:
            restored = checkpointer.restore(
                folder, ocp.args.Composite(meta=ocp.args.JsonRestore(), **args)
            )
    except Exception as raised:  # whatever Orbax makes of a damaged folder
        error = raised
    # Where the files of one process are damaged, the others must not begin a sum with it.
    if not hosts.all_hosts(error is None, f"checkpoint {folder.name}"):
        raise error or ValueError("another process cannot read it")
    for name in items:
        if int(_checksum(restored[name])) != restored["meta"]["checksums"][name]:
            raise ValueError(f"the values of {name} are not those that were saved")
    return restored


def _digest(meta: dict) -> str:
    """SHA-256 of a meta, but for the one that it holds."""
    rest = {name: value for name, value in meta.items() if name != SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(folder: pathlib.Path) -> dict:
    """The JSON of a step folder: config, step, checksums and the times of the run.

    Raises ValueError where it is not what was saved, and UserError where a newer mdt_jax has
    written it in a way that this one does not know.
    """
    _check_regular(folder)
    with _reader() as checkpointer:
        meta = checkpointer.restore(folder, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if SUM in meta and meta[SUM] != _digest(meta):  # older ones have none
        raise ValueError("its meta is not what was saved")
    of_run = folder.parent.name == FOLDER and STEP.fullmatch(folder.name)
    if of_run and int(folder.name) != meta["step"]:
        raise ValueError(f"its meta is of step {meta['step']}")
    if meta.get("format", 1) > FORMAT:
        raise UserError(
            f"checkpoint {folder} is of format {meta['format']}, newer than the {FORMAT} that this "
            "mdt_jax knows: install a newer one"
        )
    return meta


def _check_regular(folder: pathlib.Path) -> None:
    """Raise OSError for a pipe, a socket or a device in it, which Orbax would wait for."""
    for place, _, names in os.walk(folder):
        for name in names:
            check_regular(os.path.join(place, name))


def check_readable(folder: pathlib.Path, error: Exception) -> None:
    """Raise UserError where a step folder may be sound and only cannot be read just now.

    error: what reading it raised. Orbax takes files that may not be opened for missing ones, so
    each of them is tried.
    """

    def fail(why: OSError):
        if passes(why):
            raise why

    try:
        for place, _, names in os.walk(folder, onerror=fail):
            for name in names:
                check_regular(os.path.join(place, name))
                with open(os.path.join(place, name), "rb") as file:
                    while file.read(1 << 24):
                        pass
    except OSError as raised:
        error = raised
    if passes(error):
        raise UserError(
            f"checkpoint {folder} cannot be read just now: {reason(error)}; nothing was moved, the "
            "same command tries again"
        ) from None


def check_path(path: str | os.PathLike) -> None:
    """Raise UserError for a folder that Orbax could write but not read.

    It takes its path for a pattern of names, and some names for those of unfinished checkpoints.
    """
    full = str(pathlib.Path(path).absolute())
    text = full.encode(errors="backslashreplace").decode()
    found = [part for part in ("*", "?", "[", "\\", ".orbax-checkpoint-tmp") if part in full]
    if not is_text(full):
        found.append("bytes that are no UTF-8")
    if found:
        raise UserError(
            f"{text} has {' and '.join(found)} in its path, and checkpoints in such a folder "
            "cannot be read back; choose another name, or rename the folder"
        )


def quiet() -> None:
    """Orbax logs each save, leftovers of killed ones, and tracebacks of what is raised anyway."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _late_work_aside
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _late_work_aside(unraisable) -> None:
    """Reads and writes under way when another failed end after it, and each would say so."""
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in pathlib.Path(code.co_filename).parts
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def writing(path: pathlib.Path, arrays: object = ()):
    """Raise UserError where there is no room for the arrays, or for whatever Orbax raises."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    check_room(path, size + ORBAX_FILES if size else 0)
    try:
        yield
    except Exception as error:
        if hosts.may_be_lost(error):
            raise
        raise UserError(f"{path} could not be written: {reason(error)}{free(path)}") from None


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether a folder is one step of a run, or one of `save_folder`."""
    return (pathlib.Path(folder) / "meta").is_dir()


def sealed(items: dict[str, Any], meta: dict) -> ocp.args.Composite:
    """What Orbax is to save: items, and meta with their checksums and its own."""
    checksums = {name: int(_checksum(tree)) for name, tree in items.items()}
    meta = {"format": FORMAT, "step": 0, "checksums": checksums, **meta}
    meta[SUM] = _digest(meta)
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args)


def save_folder(folder: str | os.PathLike, item: str, arrays: dict, meta: dict) -> None:
    """Write one item as a folder of its own, with its meta; whole or not at all.

    Raises UserError where it cannot be written, such as on a full disk.
    """
    quiet()
    check_path(folder)
    folder = pathlib.Path(folder).absolute()
    try:
        with writing(folder, arrays), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            orbax.save(folder, sealed({item: arrays}, meta))
    except UserError:
        _remove_unfinished(folder)
        raise


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Remove what a failed save of a folder has left, to which Orbax may still be writing."""
    for _ in range(50):
        left = list(folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"))
        if not left:
            return
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def steps_of(directory: pathlib.Path) -> list[int]:
    """Finished steps, newest first: unfinished ones still have a temporary name."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir()]
    return sorted((int(name) for name in names if STEP.fullmatch(name)), reverse=True)


def steps_in(workdir: str | os.PathLike) -> list[int]:
    """The steps that a run has saved there, newest first."""
    return steps_of(pathlib.Path(workdir) / FOLDER)


def newest_sound(
    directory: pathlib.Path, read: Callable[[pathlib.Path], Read]
) -> tuple[Read | None, list[int]]:
    """read(folder) of the newest step that can be read, and the damaged steps passed over.

    Returns (None, []) where there is no step at all; raises UserError where none can be read.
    """
    damaged = []
    for step in steps_of(directory):
        try:
            return read(directory / str(step)), damaged
        except UserError:
            raise
        except Exception as error:  # whatever Orbax makes of a damaged folder
            check_readable(directory / str(step), error)
            damaged.append(step)
            log(f"checkpoint {directory / str(step)} is damaged: {reason(error)}")
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {directory} can be read; restore "
            "one from a backup, or train anew in another workdir"
        )
    return None, damaged


def load(path: str | os.PathLike, choose: Callable[[dict], tuple[str, dict]]) -> tuple[dict, dict]:
    """(arrays, meta) of one item of a workdir, its checkpoints folder, one step of it, or a folder
    of `save_folder`; of the newest step that is sound.

    choose: meta → (item, its shapes). Raises UserError when the path does not exist, holds no
    checkpoint or no such item, or none can be read.
    """
    root = pathlib.Path(path).absolute()
    if not str(path) or not os.path.exists(root):
        raise UserError(f"checkpoint '{path}' does not exist")
    if root.is_file():
        raise UserError(f"{path} is a file of no kind that holds weights, nor the folder of a run")
    check_path(root)

    def read(folder: pathlib.Path):
        meta = read_meta(folder)
        item, shapes = choose(meta)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
        )
        return restore(folder, {item: abstract})[item], meta

    _check_is_ours(root)
    if is_saved(root):
        try:
            return read(root)
        except UserError:
            raise
        except Exception as error:
            check_readable(root, error)
            raise UserError(f"checkpoint {path} is damaged: {reason(error)}") from None
    found, _ = newest_sound(root / FOLDER if (root / FOLDER).is_dir() else root, read)
    if found is None:
        kinds = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
        # Files of several parts are not read.
        held = sorted(n for n in os.listdir(root) if n.endswith(kinds) and "-of-" not in n)
        hint = f"; for the weights in {held[0]} give this file" if held else ""
        raise UserError(f"{path} holds no checkpoint: expected a workdir that was trained in{hint}")
    return found


def _check_is_ours(root: pathlib.Path) -> None:
    """Raise UserError for a folder, or one with steps, that another program wrote by Orbax."""
    for folder in (root, *(root / str(step) for step in steps_of(root))):
        names = {path.name for path in folder.iterdir()}
        if names & ORBAX_MARKS and not names & {"meta", "params", "ema", "progress"}:
            items = sorted(name for name in names if "." not in name and name not in ORBAX_MARKS)
            held = "arrays alone" if "_METADATA" in names else ", ".join(items[:3])
            raise UserError(
                f"{folder} is an Orbax checkpoint of another program: it holds {held}, not the "
                "params, ema, progress and meta of a run"
            )
