"""Masking of tokens by gather and scatter with static shapes. Pure functions."""

import jax
import jax.numpy as jnp


def keep_length(num_tokens: int, ratio: float) -> int:
    """The number of tokens kept at a mask ratio in [0, 1): int(L · (1 − ratio))."""
    return int(num_tokens * (1 - ratio))


def keep_count(num_tokens: int, ratio: float, ratio_max: float, u: jax.Array) -> jax.Array:
    """The number of tokens kept at the mask ratio ratio + (ratio_max − ratio)·u: [] int32, traced.

    u: [] float32, uniform in [0, 1). The ratio is float32, as in the published MDTv2. The count is
    at least 1 and at most `keep_length(num_tokens, ratio)`.
    """
    drawn = jnp.float32(ratio) + jnp.float32(ratio_max - ratio) * u
    count = (jnp.float32(num_tokens) * (1 - drawn)).astype(jnp.int32)
    return jnp.clip(count, 1, keep_length(num_tokens, ratio))


def keep_ids(noise: jax.Array, length: int) -> jax.Array:
    """The `length` tokens with the smallest noise, in ascending order of noise (MAE, He et al.).

    noise: [B, L] float32, uniform. Returns [B, length] int32 indices into the L tokens.
    """
    return jnp.argsort(noise, axis=-1)[:, :length].astype(jnp.int32)


def gather_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """The tokens `ids` [B, K] of tokens [B, L, D]: [B, K, D]."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)


def places(ids: jax.Array, count: jax.Array | None, num_tokens: int) -> jax.Array:
    """The indices [B, K] at which to scatter kept tokens: `ids` for the first `count` of them.

    The others get indices ≥ num_tokens, which a scatter drops. count: [] int32; None: K.
    """
    if count is None:
        return ids
    rank = jnp.arange(ids.shape[1], dtype=ids.dtype)
    return jnp.where(rank < count, ids, num_tokens + rank)


def scatter_tokens(
    kept: jax.Array, places: jax.Array, fill: jax.Array, num_tokens: int
) -> jax.Array:
    """Tokens [B, num_tokens, D]: kept ones at their places, `fill` everywhere else.

    kept: [B, K, D]; places: [B, K]; fill: [D].
    """
    base = jnp.broadcast_to(fill.astype(kept.dtype), (num_tokens, kept.shape[-1]))
    return jax.vmap(_set, in_axes=(None, 0, 0))(base, places, kept)


def masked_positions(places: jax.Array, num_tokens: int) -> jax.Array:
    """[B, num_tokens] bool, true where a token is masked; places: [B, K] of the kept tokens."""
    return jax.vmap(_set, in_axes=(None, 0, None))(jnp.ones(num_tokens, bool), places, False)


def _set(base: jax.Array, places: jax.Array, values) -> jax.Array:
    """Under vmap XLA knows that samples are independent, and keeps each on its device."""
    return base.at[places].set(values, unique_indices=True, mode="drop")
