"""JAX's backend: its devices, the precision of its products, its memory and compiled programs."""

import contextlib
import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import shutil
import sys

import jax

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log

# (kind, pattern of its device files, program of its driver, our extra that makes JAX use it)
KINDS = (
    ("an NVIDIA GPU", "/dev/nvidia[0-9]*", "nvidia-smi", "cuda"),
    ("a TPU", "/dev/accel*", None, "tpu"),
)
# Precisions of float32 products. By default JAX lets a TPU round the factors to bfloat16 and a GPU
# to TF32, which keep about three decimal digits. "highest" keeps float32, as a CPU always does.
PRECISIONS = ("highest", "high", "default")
HIGHEST = "highest"
# Parameters of mallopt in glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def start() -> None:
    """Start JAX's devices. Commands call this before they read or write anything.

    Prints a warning to stderr for each kind of accelerator that the machine has while JAX finds
    only CPUs, unless the user chose the platforms, for example with JAX_PLATFORMS=cpu. Raises
    UserError if JAX cannot start the chosen platforms.
    """
    chosen = jax.config.values["jax_platforms"]
    try:
        platform = jax.default_backend()
    except Exception as error:  # RuntimeError, or a plugin's own exception
        requested = f"{chosen}, which JAX_PLATFORMS asks for" if chosen else "its devices"
        hint = "; without JAX_PLATFORMS it takes what there is" if chosen else ""
        why = str(error)[:300] or "there is none that it can use"
        raise UserError(f"JAX cannot start {requested}: {why}{hint}") from None
    if chosen or platform != "cpu":
        return
    for kind, devices, program, extra in KINDS:
        path = min(glob.glob(devices), default=None) or (program and shutil.which(program))
        if path:
            log(
                f"warning: this machine has {kind} ({path}), but JAX finds only CPUs; to use it: "
                f"pip install -e '.[{extra}]'"
            )


def keep_compilations() -> None:
    """Cache compiled programs in the user's cache folder, unless JAX's setting is given."""
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home, "mdt_jax", "xla")
    with contextlib.suppress(OSError):  # without the folder, programs are compiled each time
        if os.path.isabs(folder):
            os.makedirs(folder, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", folder)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory if JAX runs on a CPU. Call it before the devices start.

    XLA allocates a step's buffers anew each time. By default glibc returns large ones to the
    system at once, and every page must be faulted in again: a quarter of a step of MDT-S/2. The
    price is up to twice as much memory. Returns whether it was done. It is not done with
    accelerators, with another libc or if the environment configures malloc.
    """
    configured = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if sys.platform != "linux" or configured or not _only_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena, since only the main one can grow without mmap.
    return all([mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def _only_cpu() -> bool:
    """Whether JAX will find no accelerator; this does not start it."""
    if platforms := jax.config.values["jax_platforms"]:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    modules = ("jax_plugins", "libtpu")
    return not plugins and all(importlib.util.find_spec(name) is None for name in modules)
