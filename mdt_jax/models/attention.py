"""Self-attention with MDT's learned two-dimensional relative position bias."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.gradients import with_backward
from mdt_jax.models.layers import Linear, Transpose

# The bias of a key outside the key mask, far below every logit.
MASKED_OUT = float(-0.7 * np.finfo(np.float32).max)


def relative_index(grid: tuple[int, int]) -> np.ndarray:
    """The row of the bias table for each (query, key) pair of tokens: [L, L] int32, L = H·W.

    (Δy + H−1)·(2W−1) + (Δx + W−1) with Δ = query − key, as in Swin (Liu et al. 2021).
    """
    height, width = grid
    y, x = (axis.reshape(-1) for axis in np.indices(grid))
    dy = y[:, None] - y[None, :] + height - 1
    dx = x[:, None] - x[None, :] + width - 1
    return (dy * (2 * width - 1) + dx).astype(np.int32)


def bias_rows(grid: tuple[int, int]) -> int:
    """Rows of the bias table. Published files hold three more than are ever looked up."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + 3


class Positions(NamedTuple):
    """The positions of N tokens on the grid.

    index: [1 or B, N, N] int32, the row of the bias table for each (query, key) pair.
    ids: [B, N] int32, the tokens' row-major indices; None: all tokens of the grid, in order.
    """

    index: jax.Array
    ids: jax.Array | None = None


def token_positions(grid: tuple[int, int], ids: jax.Array | None = None) -> Positions:
    """The positions of the tokens `ids` [B, N] of a grid; None: of all tokens."""
    index = jnp.asarray(relative_index(grid))
    if ids is None:
        return Positions(index[None])
    return Positions(index[ids[:, :, None], ids[:, None, :]], ids)


def bias_at(table: jax.Array, positions: Positions, grid: tuple[int, int]) -> jax.Array:
    """The bias of all pairs of tokens, [1 or B, heads, N, N]; table: [rows, heads]."""
    return _bias_lookup(grid)(table, positions)


@functools.cache
def _bias_lookup(grid: tuple[int, int]):
    def forward(table, positions):
        return _look_up(table, positions), positions

    def backward(positions, grad):
        scatter, contract = (
            functools.partial(function, grid) for function in (scattered, contracted)
        )
        return (jax.lax.platform_dependent(grad, positions, cpu=scatter, default=contract),)

    # The lookup is linear in the table.
    def tangent(positions, d_table):
        return _look_up(d_table, positions)

    return with_backward(forward, tangent, backward, inputs=1)


def _look_up(table, positions):
    return jnp.moveaxis(table[positions.index], -1, 1)


def scattered(grid: tuple[int, int], grad: jax.Array, positions: Positions) -> jax.Array:
    """The gradient of the bias table [rows, heads] by scatter-add.

    grad: gradient of the bias, [1 or B, heads, N, N].
    """
    table = jnp.zeros((bias_rows(grid), grad.shape[1]), grad.dtype)
    return table.at[positions.index].add(jnp.moveaxis(grad, 1, -1))


def contracted(grid: tuple[int, int], grad: jax.Array, positions: Positions) -> jax.Array:
    """As `scattered`, by matmuls with one-hot matrices.

    Accelerators are slow at adding many values into few rows.
    """
    (height, width), heads = grid, grad.shape[1]
    exact = "highest"  # the products are sums, which must not be rounded
    if positions.ids is None:
        pairs = grad.sum(0)
    else:
        one_hot = jax.nn.one_hot(positions.ids, height * width, dtype=grad.dtype)  # [B, N, L]
        rows = jnp.einsum("bhij,bjk->bhik", grad, one_hot, precision=exact)
        pairs = jnp.einsum("bhik,bil->hlk", rows, one_hot, precision=exact)
    pairs = pairs.reshape(heads, height, width, height, width)
    differences = _differences(height), _differences(width)
    table = jnp.einsum("hyxvu,yvd,xue->deh", pairs, *differences, precision=exact)
    unused = bias_rows(grid) - table.shape[0] * table.shape[1]
    return jnp.pad(table.reshape(-1, heads), ((0, unused), (0, 0))).astype(grad.dtype)


def _differences(size: int) -> np.ndarray:
    """[size, size, 2·size − 1] float32, one-hot: 1 where i − j + size − 1 is the last index."""
    i = np.arange(size)
    return np.eye(2 * size - 1, dtype=np.float32)[i[:, None] - i + size - 1]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    transpose: Transpose = jnp.matrix_transpose,
) -> jax.Array:
    """softmax(q·kᵀ / √d + bias)·v (Vaswani et al. 2017); the softmax is float32.

    q, k, v: [B, heads, N, d]; bias: float32, broadcast to [B, heads, N, N]; transpose: the function
    that transposes matrices. Returns [B, heads, N, d] in v's dtype.
    """
    return _attend(transpose)(q, k, v, bias)


@functools.cache
def _attend(transpose: Transpose):
    forward = functools.partial(_attend_forward, transpose)
    backward = functools.partial(_attend_backward, transpose)
    return with_backward(forward, _attend_tangent, backward)


def _attend_forward(transpose, q, k, v, bias):
    logits = jnp.matmul(q, transpose(k), preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return weights @ v, (q, k, v, bias, weights)


def _attend_tangent(saved, dq, dk, dv, d_bias):
    q, k, v, _, weights = saved
    from_q, from_k = (
        jnp.matmul(a, b.mT, preferred_element_type=jnp.float32) for a, b in ((dq, k), (q, dk))
    )
    d_logits = (from_q + from_k) * q.shape[-1] ** -0.5
    if d_bias is not None:
        d_logits = d_logits + d_bias
    w32 = weights.astype(jnp.float32)
    d_weights = w32 * (d_logits - (w32 * d_logits).sum(-1, keepdims=True))
    return d_weights.astype(v.dtype) @ v + weights @ dv


def _attend_backward(transpose, saved, grad):
    q, k, v, bias, weights = saved
    d_weights = jnp.matmul(grad, transpose(v), preferred_element_type=jnp.float32)
    w32 = weights.astype(jnp.float32)
    d_logits = w32 * (d_weights - (w32 * d_weights).sum(-1, keepdims=True))
    d_bias = None
    if bias is not None:
        broadcast = functools.partial(jnp.broadcast_to, shape=d_logits.shape)
        (d_bias,) = jax.linear_transpose(broadcast, bias)(d_logits)
    d_scaled = (d_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    return d_scaled @ k, transpose(d_scaled) @ q, transpose(weights) @ grad, d_bias


class Attention(nn.Module):
    """Multi-head self-attention; the bias is added to the logits before the softmax.

    grid: (H, W) in tokens, the size of the bias table. relative_bias: False: no bias.
    """

    num_heads: int
    grid: tuple[int, int]
    relative_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    transpose: Transpose = jnp.matrix_transpose

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: Positions, key_mask: jax.Array | None = None
    ) -> jax.Array:
        """x: [B, N, D] and the positions of its tokens → [B, N, D].

        key_mask: [N] bool, the tokens that are attended to; None: all.
        """
        batch, length, dim = x.shape
        qkv = Linear(3 * dim, dtype=self.dtype, transpose=self.transpose, name="qkv")(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, -1)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # [B, heads, N, D / heads] each
        bias: jax.Array | None = None
        if self.relative_bias:
            table = self.param(
                "relative_bias",
                nn.initializers.normal(0.02),  # published: truncated, but at 100 deviations
                (bias_rows(self.grid), self.num_heads),
            )
            bias = bias_at(table, positions, self.grid)
        if key_mask is not None:
            bias = jnp.where(key_mask, 0.0 if bias is None else bias, MASKED_OUT)
        out = jnp.moveaxis(attend(q, k, v, bias, self.transpose), 1, 2)
        out = out.reshape(batch, length, dim)
        return Linear(dim, dtype=self.dtype, transpose=self.transpose, name="proj")(out)
