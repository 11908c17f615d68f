"""Latent masking as static-shape gather and scatter of tokens. Pure functions."""

import jax
import jax.numpy as jnp


def keep_length(num_tokens: int, ratio: float) -> int:
    """How many of L tokens stay when a share `ratio` in [0, 1) is masked: int(L · (1 − ratio))."""
    return int(num_tokens * (1 - ratio))


def keep_ids(noise: jax.Array, length: int) -> jax.Array:
    """The tokens to keep: those with the smallest noise, in ascending order of noise.

    noise: [B, L] float32, uniform draws. Returns [B, length] int32 indices into the L tokens.
    """
    return jnp.argsort(noise, axis=-1)[:, :length].astype(jnp.int32)


def gather_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """tokens: [B, L, D], ids: [B, K] → the kept tokens [B, K, D]."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)


def scatter_tokens(kept: jax.Array, ids: jax.Array, fill: jax.Array, num_tokens: int) -> jax.Array:
    """Put kept tokens back at their places and `fill` everywhere else.

    kept: [B, K, D], ids: [B, K], fill: [D] → [B, num_tokens, D].
    """
    batch, _, dim = kept.shape
    base = jnp.broadcast_to(fill.astype(kept.dtype), (batch, num_tokens, dim))
    return base.at[jnp.arange(batch)[:, None], ids].set(kept, unique_indices=True)


def masked_positions(ids: jax.Array, num_tokens: int) -> jax.Array:
    """ids: [B, K] kept tokens → [B, num_tokens] bool, true where a token is masked."""
    batch = ids.shape[0]
    masked = jnp.ones((batch, num_tokens), bool)
    return masked.at[jnp.arange(batch)[:, None], ids].set(False, unique_indices=True)
