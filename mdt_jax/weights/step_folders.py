"""The folders of a run's steps: WORKDIR/checkpoints/STEP, and where such folders can be.

On a disk a folder gets its name once it is complete. In a bucket, where nothing can be renamed, it
is complete once it has the object COMMIT.
"""

import os
import re

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import (
    Path,
    absolute,
    as_path,
    in_bucket,
    is_dir,
    is_file,
    is_text,
    names_in,
)

FOLDER = "checkpoints"
STEP = re.compile("0|[1-9][0-9]*")  # the name of a step's folder
COMMIT = "commit_success.txt"  # what Orbax writes last in a folder of a bucket
DAMAGED = "damaged.txt"  # what takes its place where the folder turned out to be damaged


def steps_in(workdir: str | os.PathLike) -> list[int]:
    """The steps that a run has saved, newest first."""
    return steps_of(as_path(workdir) / FOLDER)


def steps_of(directory: Path) -> list[int]:
    """The finished steps in a folder of checkpoints, newest first."""
    return [step for step in _step_folders(directory) if _is_finished(directory / str(step))]


def unfinished_steps(directory: Path) -> list[int]:
    """The steps in a bucket of which a part is there, newest first, without the damaged ones.

    On a disk they have temporary names, and Orbax removes them.
    """
    if not in_bucket(directory):
        return []
    folders = {step: names_in(directory / str(step)) for step in _step_folders(directory)}
    return [step for step, names in folders.items() if not {COMMIT, DAMAGED} & {*names}]


def _step_folders(directory: Path) -> list[int]:
    numbers = [int(name) for name in names_in(directory) if STEP.fullmatch(name)]
    return sorted(numbers, reverse=True)


def _is_finished(folder: Path) -> bool:
    return not in_bucket(folder) or is_file(folder / COMMIT)


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether a folder is one finished step of a run, or a folder of `save_folder`."""
    folder = as_path(folder)
    return is_dir(folder / "meta") and _is_finished(folder)


def check_path(path: str | os.PathLike) -> None:
    """Raise UserError for a folder that Orbax could write but not read.

    Orbax takes its path for a glob pattern, and some names for those of unfinished checkpoints.
    """
    full = str(absolute(path))
    text = full.encode(errors="backslashreplace").decode()
    unusable = [part for part in ("*", "?", "[", "\\", ".orbax-checkpoint-tmp") if part in full]
    if not is_text(full):
        unusable.append("bytes that are no UTF-8")
    if unusable:
        raise UserError(
            f"{text} has {' and '.join(unusable)} in its path, and checkpoints in such a folder "
            "cannot be read back; choose another name, or rename the folder"
        )


def check_arrays_possible(path: Path) -> None:
    """Raise UserError for a place to which Orbax cannot write arrays."""
    if in_bucket(path) and not str(path).startswith("gs://"):
        raise UserError(
            f"{path}: Orbax writes and reads arrays on disks and in gs:// only; a file of weights, "
            "data and samples may be in s3://"
        )
