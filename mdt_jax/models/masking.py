"""Latent masking as static-shape gather and scatter of tokens. Pure functions."""

import jax
import jax.numpy as jnp


def keep_length(num_tokens: int, ratio: float) -> int:
    """How many of L tokens stay when a share `ratio` in [0, 1) is masked: int(L · (1 − ratio))."""
    return int(num_tokens * (1 - ratio))


def keep_count(num_tokens: int, ratio: float, ratio_max: float, u: jax.Array) -> jax.Array:
    """The kept length at a ratio drawn from [ratio, ratio_max): [] int32, traced.

    u: [] float32 uniform in [0, 1). The ratio is float32, as in the published MDTv2, and the length
    never exceeds `keep_length(num_tokens, ratio)`.
    """
    drawn = jnp.float32(ratio) + jnp.float32(ratio_max - ratio) * u
    count = (jnp.float32(num_tokens) * (1 - drawn)).astype(jnp.int32)
    return jnp.clip(count, 1, keep_length(num_tokens, ratio))


def keep_ids(noise: jax.Array, length: int) -> jax.Array:
    """The tokens to keep: those with the smallest noise, in ascending order of noise.

    noise: [B, L] float32, uniform draws. Returns [B, length] int32 indices into the L tokens.
    """
    return jnp.argsort(noise, axis=-1)[:, :length].astype(jnp.int32)


def gather_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """tokens: [B, L, D], ids: [B, K] → the kept tokens [B, K, D]."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)


def places(ids: jax.Array, count: jax.Array | None, num_tokens: int) -> jax.Array:
    """Where kept tokens belong: ids [B, K], but those from `count` on lie outside the L tokens.

    Scatters drop what lies outside. count: [] int32; None: all K count.
    """
    if count is None:
        return ids
    rank = jnp.arange(ids.shape[1], dtype=ids.dtype)
    return jnp.where(rank < count, ids, num_tokens + rank)


def scatter_tokens(
    kept: jax.Array, places: jax.Array, fill: jax.Array, num_tokens: int
) -> jax.Array:
    """Put kept tokens back at their places and `fill` everywhere else.

    kept: [B, K, D], places: [B, K], fill: [D] → [B, num_tokens, D].
    """
    base = jnp.broadcast_to(fill.astype(kept.dtype), (num_tokens, kept.shape[-1]))
    return jax.vmap(_set, in_axes=(None, 0, 0))(base, places, kept)


def masked_positions(places: jax.Array, num_tokens: int) -> jax.Array:
    """places: [B, K] of kept tokens → [B, num_tokens] bool, true where a token is masked."""
    return jax.vmap(_set, in_axes=(None, 0, None))(jnp.ones(num_tokens, bool), places, False)


def _set(base: jax.Array, places: jax.Array, values) -> jax.Array:
    """Under vmap, so that XLA knows that samples are apart and leaves them on their devices."""
    return base.at[places].set(values, unique_indices=True, mode="drop")
