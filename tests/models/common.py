"""What the tests of the network share."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.weights.kinds import shapes_of


def apply(model, params, *inputs, **options):
    return jax.jit(lambda *a: model.apply({"params": params}, *a), **options)(*inputs)


def random_params(model, seed=0):
    """Parameters as at the start, but none of them zero; nothing is compiled for them."""
    shapes = shapes_of(model)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key.endswith("pos_embed"):
            return jnp.asarray(sincos_positions(model.grid, model.hidden_size)[None])
        inputs = math.prod(leaf.shape[:3]) if leaf.ndim == 4 else leaf.shape[-2:][0]
        deviation = inputs**-0.5 if path[-1].key == "kernel" else 0.1
        return jnp.asarray(random.normal(0, deviation, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
