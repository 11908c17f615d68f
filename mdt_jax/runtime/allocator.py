"""What a training step frees on a CPU is kept for the next one."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jax

# <malloc.h> of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, where JAX runs on a CPU; call it before devices are asked for.

    XLA allocates the buffers of a step anew each time, and glibc gives large ones back at once, so
    that every page is faulted in again: a quarter of a step of MDT-S/2. The price is memory, up to
    twice as much. Returns whether it was done: not beside accelerators, with another libc, or
    where the environment sets malloc up.
    """
    theirs = any(name.startswith("MALLOC_") for name in os.environ)
    theirs = theirs or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or theirs or not _only_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena, since only the main one can grow without mmap.
    return all([mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def _only_cpu() -> bool:
    """Whether JAX will find no accelerator, told without starting it."""
    platforms = jax.config.values["jax_platforms"]
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    modules = ("jax_plugins", "libtpu")
    return not plugins and all(importlib.util.find_spec(name) is None for name in modules)
