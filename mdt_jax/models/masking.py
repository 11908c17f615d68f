"""Masking of tokens by gathers with static shapes. Pure functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdt_jax.models.gradients import with_backward


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


class Kept(NamedTuple):
    """The tokens of a grid that the encoder sees.

    ids: [B, K] int32, their row-major indices. used: [K] bool, false for unused rows, which have no
    token; None: all have. ranks: [B, L] int32, the row of each token of the grid among the K.
    visible: [B, L] bool, true where a token is kept; elsewhere its rank has no meaning.
    """

    ids: jax.Array
    used: jax.Array | None
    ranks: jax.Array
    visible: jax.Array


def kept_tokens(ids: jax.Array, count: jax.Array | None, num_tokens: int) -> Kept:
    """The first `count` of the tokens `ids` [B, K], of `num_tokens`; count: [] int32; None: K."""
    rank = jnp.arange(ids.shape[1], dtype=jnp.int32)
    used = None if count is None else rank < count
    places = ids if used is None else jnp.where(used, ids, num_tokens + rank)
    # Under vmap XLA knows that samples are independent, and keeps each on its device.
    masked = jnp.full(num_tokens, len(rank), jnp.int32)
    ranks = jax.vmap(_set, in_axes=(None, 0, None))(masked, places, rank)
    return Kept(ids, used, jnp.minimum(ranks, len(rank) - 1), ranks < len(rank))


def _set(base: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    return base.at[places].set(values, unique_indices=True, mode="drop")


def take(tokens: jax.Array, kept: Kept) -> jax.Array:
    """The kept ones of a grid's tokens [B, L, D]: [B, K, D], zeros in unused rows."""
    used = None if kept.used is None else kept.used[None]
    return _rows(tokens, (kept.ids, used), (kept.ranks, kept.visible))


def put(tokens: jax.Array, kept: Kept) -> jax.Array:
    """Kept tokens [B, K, D] at their places in the grid: [B, L, D], zeros where it is masked."""
    used = None if kept.used is None else kept.used[None]
    return _rows(tokens, (kept.ranks, kept.visible), (kept.ids, used))


def _gather(tokens: jax.Array, index: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Rows of tokens [B, N, D] by index [B, M]; zeros where mask [1 or B, M] is false."""
    rows = jnp.take_along_axis(tokens, index[:, :, None], axis=1, mode="clip")
    return rows if mask is None else jnp.where(mask[:, :, None], rows, 0)


# (tokens, index and mask, those of the inverse) → rows. The gradient is a gather, too: JAX's own
# would be a scatter-add, which accelerators are slow at.
_rows = with_backward(
    lambda tokens, there, back: (_gather(tokens, *there), (there, back)),
    lambda saved, d_tokens: _gather(d_tokens, *saved[0]),
    lambda saved, grad: (_gather(grad, *saved[1]),),
    inputs=1,
)
