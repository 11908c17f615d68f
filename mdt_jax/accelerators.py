"""Accelerators that a machine has and JAX does not use."""

import glob
import shutil
import sys

import jax

# (kind, pattern of its device files, program of its driver, our extra that makes JAX use it)
KINDS = (
    ("an NVIDIA GPU", "/dev/nvidia[0-9]*", "nvidia-smi", "cuda"),
    ("a TPU", "/dev/accel*", None, "tpu"),
)


def warn_of_unused() -> None:
    """Print a line to stderr for each kind that is visible while JAX has only CPUs.

    Starts JAX's devices. Prints nothing where the user has chosen the platforms, for example with
    JAX_PLATFORMS=cpu.
    """
    if jax.config.values["jax_platforms"] or jax.default_backend() != "cpu":
        return
    for kind, devices, program, extra in KINDS:
        place = min(glob.glob(devices), default=None) or (program and shutil.which(program))
        if place:
            print(
                f"warning: this machine has {kind} ({place}), but JAX finds only CPUs; to use it: "
                f"pip install -e '.[{extra}]'",
                file=sys.stderr,
            )
