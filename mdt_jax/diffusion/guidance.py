"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) and its weights.

A weight is a function of timesteps t [B] in 0…T−1 and the scale w, a number or [B], that returns
[B] float32. Weight 1 is the conditional prediction.
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
    network: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    labels: jax.Array,
    null_label: int,
    weight: Callable[[jax.Array], jax.Array],
    channels: int | None = 3,
) -> Network:
    """The guided network (x [B, H, W, C], t [B]) → [B, H, W, 2C].

    ε = ε_null + w(t)·(ε_cond − ε_null) (Ho & Salimans, equation 6, with w for their w + 1) on the
    first `channels` channels of ε; None: on all. The other channels and the variance are those of
    the conditional prediction. The published code guides 3 channels.
    network: (x, t, y) → [2B, H, W, 2C], called with both halves as one batch; labels: [B] int;
    weight: t [B] → [B].
    """
    batch = labels.shape[0]
    both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        count = x.shape[-1] if channels is None else min(channels, x.shape[-1])
        out = network(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both_labels)
        cond, null = out[:batch], out[batch:, ..., :count]
        eps = null + weight(t)[:, None, None, None] * (cond[..., :count] - null)
        return jnp.concatenate([eps, cond[..., count:]], axis=-1)

    return guided
