"""Self-attention with MDT's learned two-dimensional relative position bias."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.gradients import with_backward
from mdt_jax.models.layers import Linear, transposed


def relative_index(grid: tuple[int, int]) -> np.ndarray:
    """The row of the bias table for each (query, key) pair of tokens: [L, L] int32, L = H·W.

    (Δy + H−1)·(2W−1) + (Δx + W−1) with Δ = query − key.
    """
    height, width = grid
    y, x = (axis.reshape(-1) for axis in np.indices(grid))
    dy = y[:, None] - y[None, :] + height - 1
    dx = x[:, None] - x[None, :] + width - 1
    return (dy * (2 * width - 1) + dx).astype(np.int32)


def bias_rows(grid: tuple[int, int]) -> int:
    """Rows of the bias table. The last three are never looked up, but published files hold them."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + 3


UNSEEN = float(-0.7 * np.finfo(np.float32).max)  # a logit that no other is below


class Positions(NamedTuple):
    """Where tokens are. index: [1 or B, N, N] int32, their `relative_index`; ids: [B, N] int32,
    which of the grid's tokens they are; None: all, in order."""

    index: jax.Array
    ids: jax.Array | None = None


def positions(grid: tuple[int, int], ids: jax.Array | None = None) -> Positions:
    """The positions of the tokens `ids` [B, N] of a grid, or of all of them."""
    index = jnp.asarray(relative_index(grid))
    if ids is None:
        return Positions(index[None])
    return Positions(index[ids[:, :, None], ids[:, None, :]], ids)


def bias_at(table: jax.Array, where: Positions, grid: tuple[int, int]) -> jax.Array:
    """table: [rows, heads] → the bias of all pairs of tokens, [1 or B, heads, N, N]."""
    return _bias_of(grid)(table, where)


@functools.cache
def _bias_of(grid: tuple[int, int]):
    add = functools.partial(scattered, grid), functools.partial(contracted, grid)

    def backward(where, grad):
        return (jax.lax.platform_dependent(grad, where, cpu=add[0], default=add[1]),)

    # The lookup is linear in the table.
    return with_backward(lambda *args: (_looked_up(*args), args[1]),
                         lambda where, d_table: _looked_up(d_table, where),
                         backward, inputs=1)  # fmt: skip


def _looked_up(table, where):
    return jnp.moveaxis(table[where.index], -1, 1)


def scattered(grid: tuple[int, int], grad: jax.Array, where: Positions) -> jax.Array:
    """The table's gradient [rows, heads] of the bias's [1 or B, heads, N, N], added one by one."""
    table = jnp.zeros((bias_rows(grid), grad.shape[1]), grad.dtype)
    return table.at[where.index].add(jnp.moveaxis(grad, 1, -1))


def contracted(grid: tuple[int, int], grad: jax.Array, where: Positions) -> jax.Array:
    """The same as matmuls with matrices of zeros and ones, since accelerators add such a number of
    values into so few rows only slowly."""
    (height, width), heads = grid, grad.shape[1]
    exact = "highest"  # sums, whatever the precision of products
    if where.ids is None:
        pairs = grad.sum(0)
    else:
        chosen = jax.nn.one_hot(where.ids, height * width, dtype=grad.dtype)  # [B, N, L]
        rows = jnp.einsum("bhij,bjk->bhik", grad, chosen, precision=exact)
        pairs = jnp.einsum("bhik,bil->hlk", rows, chosen, precision=exact)
    pairs = pairs.reshape(heads, height, width, height, width)
    of_axes = _differences(height), _differences(width)
    table = jnp.einsum("hyxvu,yvd,xue->deh", pairs, *of_axes, precision=exact)
    unused = bias_rows(grid) - table.shape[0] * table.shape[1]
    return jnp.pad(table.reshape(-1, heads), ((0, unused), (0, 0))).astype(grad.dtype)


def _differences(size: int) -> np.ndarray:
    """[size, size, 2·size − 1] float32: 1 where i − j + size − 1 is the last index."""
    i = np.arange(size)
    return np.eye(2 * size - 1, dtype=np.float32)[i[:, None] - i + size - 1]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """softmax(q·kᵀ / √d + bias)·v, [B, heads, N, d] like q, k and v.

    bias: float32, of any shape that broadcasts to [B, heads, N, N]; the softmax is float32.
    """
    return _attend(q, k, v, bias)


def _attend_forward(q, k, v, bias):
    logits = jnp.matmul(q, transposed(k), preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return weights @ v, (q, k, v, bias, weights)


def _attend_tangent(kept, dq, dk, dv, d_bias):
    q, k, v, _, weights = kept
    both = [jnp.matmul(a, b.mT, preferred_element_type=jnp.float32) for a, b in ((dq, k), (q, dk))]
    d_logits = (both[0] + both[1]) * q.shape[-1] ** -0.5
    if d_bias is not None:
        d_logits = d_logits + d_bias
    w32 = weights.astype(jnp.float32)
    d_weights = w32 * (d_logits - (w32 * d_logits).sum(-1, keepdims=True))
    return d_weights.astype(v.dtype) @ v + weights @ dv


def _attend_backward(kept, grad):
    q, k, v, bias, weights = kept
    d_weights = jnp.matmul(grad, transposed(v), preferred_element_type=jnp.float32)
    w32 = weights.astype(jnp.float32)
    d_logits = w32 * (d_weights - (w32 * d_weights).sum(-1, keepdims=True))
    d_bias = None
    if bias is not None:
        spread = functools.partial(jnp.broadcast_to, shape=d_logits.shape)
        (d_bias,) = jax.linear_transpose(spread, bias)(d_logits)
    d_scaled = (d_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    return d_scaled @ k, transposed(d_scaled) @ q, transposed(weights) @ grad, d_bias


_attend = with_backward(_attend_forward, _attend_tangent, _attend_backward)


class Attention(nn.Module):
    """Multi-head self-attention, the bias added to the logits before the softmax.

    grid: (H, W) in tokens, which sizes the bias table. relative_bias: whether there is one.
    """

    num_heads: int
    grid: tuple[int, int]
    relative_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, where: Positions, seen: jax.Array | None = None) -> jax.Array:
        """x: [B, N, D]; where: the positions of its tokens.

        seen: [N] bool, the tokens that others may look at; None: all. Returns [B, N, D].
        """
        batch, length, dim = x.shape
        qkv = Linear(3 * dim, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, -1)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # [B, heads, N, D / heads] each
        bias: jax.Array | None = None
        if self.relative_bias:
            table = self.param(
                "relative_bias",
                nn.initializers.normal(0.02),  # published: truncated, but at 100 deviations
                (bias_rows(self.grid), self.num_heads),
            )
            bias = bias_at(table, where, self.grid)
        if seen is not None:
            bias = jnp.where(seen, 0.0 if bias is None else bias, UNSEEN)
        out = jnp.moveaxis(attend(q, k, v, bias), 1, 2)
        return Linear(dim, dtype=self.dtype, name="proj")(out.reshape(batch, length, dim))
