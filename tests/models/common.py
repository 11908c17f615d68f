"""What the tests of the network share."""

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.mdt import init_params


def apply(model, params, *inputs, **options):
    return jax.jit(lambda *a: model.apply({"params": params}, *a), **options)(*inputs)


def random_params(model, seed=0):
    """Initial parameters with the zeros replaced, so that outputs are not zero."""
    leaves, tree = jax.tree.flatten(init_params(model, jax.random.key(seed)))
    random = np.random.default_rng(seed)
    leaves = [
        a if np.any(a) else jnp.asarray(random.normal(0, 0.1, a.shape), a.dtype) for a in leaves
    ]
    return tree.unflatten(leaves)
