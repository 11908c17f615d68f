"""Weights that a new run starts from."""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.hosts import log0
from mdt_jax.weights import networks
from mdt_jax.weights.orbax_folders import steps_in


def read_weights(
    config: ConfigDict, workdir: pathlib.Path, model: MDT, key: jax.Array
) -> dict | None:
    """{"params", "ema"} of init.checkpoint; None where it is empty, or the run resumes.

    key: for parameters that are initialised anew. Raises UserError where the weights do not fit.
    """
    if not config.init.checkpoint or steps_in(workdir):
        return None
    params, ema, changes = networks.start_from(config, model, key)
    for line in [f"parameters and EMA are those of {config.init.checkpoint}", *changes]:
        log0(f"init.checkpoint: {line}")
    # A step donates its state, so that parameters and EMA must not share memory.
    return {"params": params, "ema": jax.tree.map(np.array, ema)}
