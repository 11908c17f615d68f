"""Guidance by a weaker prediction (Ho & Salimans 2022, arXiv 2207.12598) and its weights.

A weight is a function of timesteps t [B] in 0…T−1 and the scale w, a number or [B], that returns
[B] float32. Weight 1 is the prediction without guidance.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Network = Callable[[jax.Array, jax.Array], jax.Array]


def _rise(t: jax.Array, power: float, total: int) -> jax.Array:
    """From 0 at the noisy end (t = total) to 1 at t = 0; constantly 1 for power 0."""
    return (1 - jnp.cos(jnp.pi * (1 - t.astype(jnp.float32) / total) ** power)) / 2


def constant(t: jax.Array, scale, power: float = 0.0, total: int = 1000) -> jax.Array:
    """w at every timestep; `power` and `total` are not used."""
    return jnp.zeros(t.shape, jnp.float32) + scale


def power_cosine(t: jax.Array, scale, power: float, total: int = 1000) -> jax.Array:
    """MDT's weight in the published code: 1 + (w − 1)·(1 − cos π(1 − t/T)^p)/2, p = `power`.

    It rises from 1 at t = T to w at t = 0.
    """
    return 1 + (scale - 1) * _rise(t, power, total)


def power_cosine_printed(t: jax.Array, scale, power: float, total: int = 1000) -> jax.Array:
    """MDT's weight in the paper, appendix D: w·(1 − cos π(t'/t_max)^s)/2, from 0 to w; s = `power`.

    The paper's t' increases during sampling: t' = T − t.
    """
    return scale * _rise(t, power, total)


WEIGHTS = {
    "constant": constant,
    "power_cosine": power_cosine,
    "power_cosine_printed": power_cosine_printed,
}


def limit_to_interval(
    t: jax.Array, weight: jax.Array, low: float, high: float, total: int
) -> jax.Array:
    """The weight [B] where low ≤ t/T ≤ high, and 1 elsewhere (T = `total`).

    Guidance in a limited interval: Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """
    # t is compared with constants, so that compiled and NumPy code agree on a boundary.
    first, last = np.float32(low * total), np.float32(high * total)
    t = t.astype(jnp.float32)
    return jnp.where((first <= t) & (t <= last), weight, 1.0)


def snap_to_one(weight: jax.Array, tolerance: float) -> jax.Array:
    """The weight [B], and exactly 1 where it differs from 1 by less than the tolerance."""
    return jnp.where(jnp.abs(weight - 1) < tolerance, 1.0, weight)


def guide(
    strong: jax.Array, weak: jax.Array, weight: jax.Array, channels: int | None = 3
) -> jax.Array:
    """The guided output, ε = ε_weak + w·(ε_strong − ε_weak): [B, H, W, 2C].

    strong, weak: outputs [B, H, W, 2C] of the network and of a weaker one; what they predict may be
    ε, v or velocity. weight: w [B]. In classifier-free guidance the weaker one does not know the
    class (Ho & Salimans, equation 6, with w for their w + 1); in autoguidance it is smaller or
    trained for less long (Karras et al. 2024, arXiv 2406.02507).
    The first `channels` channels are guided; None: all. The other channels and the variance are
    those of `strong`. The published code guides 3 channels.
    """
    half = strong.shape[-1] // 2
    count = half if channels is None else min(channels, half)
    weak = weak[..., :count]
    guided = weak + weight[:, None, None, None] * (strong[..., :count] - weak)
    return jnp.concatenate([guided, strong[..., count:]], axis=-1)
