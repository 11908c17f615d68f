"""The noise of each sample: a function of the seed, the sample's number and the draw alone."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.mdt import MDT


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of each sample in a batch: that of a number, or interpolated between two numbers.

    number, to: [B] int32. mix: [B] float32 in [0, 1], the position from `number` to `to`; required
    with `to`.
    """

    number: jax.Array | np.ndarray
    to: jax.Array | np.ndarray | None = None
    mix: jax.Array | np.ndarray | None = None


jax.tree_util.register_dataclass(Noise)


def slerp(a: jax.Array, b: jax.Array, mix: jax.Array) -> jax.Array:
    """Spherical linear interpolation from a to b, which keeps the norm of Gaussian noise.

    a, b: arrays of one shape, each treated as one vector; mix: scalar in [0, 1]. Shoemake 1985,
    "Animating rotation with quaternion curves".
    """
    cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    parallel = jnp.sin(angle) < 1e-3  # linear interpolation then; also for a = b
    safe = jnp.where(parallel, 1.0, jnp.sin(angle))
    from_a = jnp.where(parallel, 1 - mix, jnp.sin((1 - mix) * angle) / safe)
    return from_a * a + jnp.where(parallel, mix, jnp.sin(mix * angle) / safe) * b


def draw(model: MDT, key: jax.Array, noise: Noise, k: jax.Array | int) -> jax.Array:
    """Draw number k of each sample: [B, H, W, C] float32, standard normal.

    key: of a seed. Draw 0 is the sample's starting point.
    """
    shape = (*model.input_size, model.in_channels)

    def one(number):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, number), k), shape)

    draws = jax.vmap(one)(noise.number)
    if noise.to is None:
        return draws
    return jax.vmap(slerp)(draws, jax.vmap(one)(noise.to), cast(jax.Array, noise.mix))
