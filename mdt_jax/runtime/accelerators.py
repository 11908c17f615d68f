"""JAX's devices: those that are asked for are there, and those that are there are used."""

import contextlib
import glob
import os
import shutil
import sys

import jax

from mdt_jax.runtime.errors import UserError

# (kind, pattern of its device files, program of its driver, our extra that makes JAX use it)
KINDS = (
    ("an NVIDIA GPU", "/dev/nvidia[0-9]*", "nvidia-smi", "cuda"),
    ("a TPU", "/dev/accel*", None, "tpu"),
)


def start() -> None:
    """Start JAX's devices, before anything is read or written.

    Prints a line to stderr for each kind that is visible while JAX has only CPUs, unless the user
    has chosen the platforms, for example with JAX_PLATFORMS=cpu. Raises UserError where JAX cannot
    start what was chosen.
    """
    chosen = jax.config.values["jax_platforms"]
    try:
        platform = jax.default_backend()
    except Exception as error:  # RuntimeError, or what a plugin raises
        asked = f"{chosen}, which JAX_PLATFORMS asks for" if chosen else "its devices"
        hint = "; without JAX_PLATFORMS it takes what there is" if chosen else ""
        why = str(error)[:300] or "there is none that it can use"
        raise UserError(f"JAX cannot start {asked}: {why}{hint}") from None
    if chosen or platform != "cpu":
        return
    for kind, devices, program, extra in KINDS:
        place = min(glob.glob(devices), default=None) or (program and shutil.which(program))
        if place:
            print(
                f"warning: this machine has {kind} ({place}), but JAX finds only CPUs; to use it: "
                f"pip install -e '.[{extra}]'",
                file=sys.stderr,
            )


def keep_compilations() -> None:
    """Cache compiled programs in the user's cache folder, unless JAX was told where or not to."""
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = os.path.join(home, "mdt_jax", "xla")
    with contextlib.suppress(OSError):  # then programs are compiled each time
        if os.path.isabs(place):
            os.makedirs(place, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", place)
