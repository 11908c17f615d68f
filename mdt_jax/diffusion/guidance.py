"""Classifier-free guidance: weights over the timesteps, and the network that they guide.

A weight is a function of (t [B] timesteps 0…T−1, scale: a number or [B]) → [B] float32. Weight 1 is
the conditional prediction alone.
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
    """w at every timestep (Ho & Salimans 2022); `power` and `total` are not used."""
    return jnp.zeros(t.shape, jnp.float32) + scale


def power_cosine(t: jax.Array, scale, power: float, total: int = 1000) -> jax.Array:
    """MDT's weight as the published code has it: 1 + (w − 1)·(1 − cos π(1 − t/T)^p)/2.

    From 1 at the noisy end to w at t = 0.
    """
    return 1 + (scale - 1) * _rise(t, power, total)


def power_cosine_printed(t: jax.Array, scale, power: float, total: int = 1000) -> jax.Array:
    """The weight as the paper's appendix D prints it: w·(1 − cos π(t'/t_max)^s)/2, from 0 to w.

    The paper counts t' along sampling, so t' = T − t here.
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
    """A weight [B] where low ≤ t/T ≤ high, and 1 elsewhere: guidance in a limited interval.

    Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """
    # Only compared, and with constants: so a boundary is the same compiled or not.
    first, last = np.float32(low * total), np.float32(high * total)
    t = t.astype(jnp.float32)
    return jnp.where((first <= t) & (t <= last), weight, 1.0)


def snap_to_one(weight: jax.Array, tolerance: float) -> jax.Array:
    """A weight [B], but 1 where it differs from 1 by less than the tolerance."""
    return jnp.where(jnp.abs(weight - 1) < tolerance, 1.0, weight)


def guide(
    network: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    labels: jax.Array,
    null_label: int,
    weight: Callable[[jax.Array], jax.Array],
    channels: int | None = 3,
) -> Network:
    """The guided network (x, t) → [B, H, W, 2C].

    ε = ε_null + w(t)·(ε_cond − ε_null) on the first `channels` channels of ε (None: on all); the
    other channels and the variance are the conditional prediction's.
    network: (x, t, y) → [.., 2C]; labels: [B] int; weight: t [B] → [B].
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
