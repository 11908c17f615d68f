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

    ids: [B, K] int32, their row-major indices; an index ≥ L marks an unused row. ranks: [B, L]
    int32, the row of each token of the grid among the K, or K where the token is masked.
    """

    ids: jax.Array
    ranks: jax.Array

    @property
    def visible(self) -> jax.Array:
        """[B, L] bool, true where a token is kept."""
        return self.ranks < self.ids.shape[1]


def kept_tokens(ids: jax.Array, count: jax.Array | None, num_tokens: int) -> Kept:
    """The first `count` of the tokens `ids` [B, K], of `num_tokens`; count: [] int32; None: K."""
    rank = jnp.arange(ids.shape[1], dtype=jnp.int32)
    if count is not None:
        ids = jnp.where(rank < count, ids, num_tokens + rank)
    masked = jnp.full(num_tokens, ids.shape[1], jnp.int32)
    # Under vmap XLA knows that samples are independent, and keeps each on its device.
    return Kept(ids, jax.vmap(_set, in_axes=(None, 0, None))(masked, ids, rank))


def _set(base: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    return base.at[places].set(values, unique_indices=True, mode="drop")


def take(tokens: jax.Array, kept: Kept) -> jax.Array:
    """The kept ones of a grid's tokens [B, L, D]: [B, K, D], zeros in unused rows."""
    return _permuted(tokens, kept.ids, kept.ranks)


def put(tokens: jax.Array, kept: Kept) -> jax.Array:
    """Kept tokens [B, K, D] at their places in the grid: [B, L, D], zeros where it is masked."""
    return _permuted(tokens, kept.ranks, kept.ids)


def _gather(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of tokens [B, N, D] by index [B, M]; zeros where the index is ≥ N."""
    return jnp.take_along_axis(tokens, index[:, :, None], axis=1, mode="fill", fill_value=0)


# (tokens, index, inverse) → rows by index. The gradient is a gather, too: JAX's own would be a
# scatter-add, which accelerators are slow at.
_permuted = with_backward(
    lambda tokens, index, inverse: (_gather(tokens, index), (index, inverse)),
    lambda saved, d_tokens: _gather(d_tokens, saved[0]),
    lambda saved, grad: (_gather(grad, saved[1]),),
    inputs=1,
)
