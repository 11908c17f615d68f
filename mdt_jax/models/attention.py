"""Self-attention with MDT's learned two-dimensional relative position bias."""

import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models import masking, xla
from mdt_jax.models.gradients import with_backward
from mdt_jax.models.layers import Linear
from mdt_jax.models.masking import Kept
from mdt_jax.models.xla import Ops


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


def bias_at(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The bias of all pairs of a grid's tokens, [1, heads, L, L]; table: [rows, heads]."""
    return _bias_lookup(grid)(table)


@functools.cache
def _bias_lookup(grid: tuple[int, int]):
    # The lookup is linear in the table.
    def look_up(_, table):
        return jnp.moveaxis(table[relative_index(grid)], -1, 0)[None]

    return with_backward(
        lambda table: (look_up(None, table), ()),
        look_up,
        lambda _, grad: (_bias_gradient(grid, grad[0]),),
    )


def _bias_gradient(grid: tuple[int, int], pairs: jax.Array) -> jax.Array:
    """The gradient of the table [rows, heads] from that of the bias [heads, L, L].

    By matmuls with one-hot matrices: all platforms are slow at adding many values into few rows.
    """
    (height, width), heads = grid, len(pairs)
    pairs = pairs.reshape(heads, height, width, height, width)
    differences = _differences(height), _differences(width)
    # The products are sums, which must not be rounded.
    table = jnp.einsum("hyxvu,yvd,xue->deh", pairs, *differences, precision="highest")
    unused = bias_rows(grid) - table.shape[0] * table.shape[1]
    return jnp.pad(table.reshape(-1, heads), ((0, unused), (0, 0)))


def _differences(size: int) -> np.ndarray:
    """[size, size, 2·size − 1] float32, one-hot: 1 where i − j + size − 1 is the last index."""
    i = np.arange(size)
    return np.eye(2 * size - 1, dtype=np.float32)[i[:, None] - i + size - 1]


class Attention(nn.Module):
    """Multi-head self-attention; the bias is added to the logits before the softmax.

    grid: (H, W) in tokens, the size of the bias table. relative_bias: False: no bias. qk_norm: each
    head's queries and keys are normalised, x / √(mean(x²) + 1e-6) · scale with scales [head size]
    that the heads share and that start at 1 (RMSNorm, Zhang & Sennrich 2019, as in Stable Diffusion
    3, arXiv 2403.03206). The norm is computed in float32. At scales of 1 a logit without its bias
    is at most √(head size).
    """

    num_heads: int
    grid: tuple[int, int]
    relative_bias: bool = True
    ops: Ops = Ops()
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, kept: Kept | None = None) -> jax.Array:
        """x: [B, L, D], all tokens of the grid, or the kept ones, [B, K, D] → the same shape."""
        dim, bias = x.shape[-1], None
        qkv = Linear(3 * dim, self.ops, name="qkv")(x)
        if kept is not None:
            # Where tokens are in the order of the grid, one bias serves all samples.
            qkv = masking.put(qkv, kept)
        q, k, v = (
            einops.rearrange(each, "b n (h d) -> b n h d", h=self.num_heads)
            for each in jnp.split(qkv, 3, axis=-1)
        )
        if self.qk_norm:
            # Without recomputation the backward pass keeps six float32 arrays of the size of x.
            norm = nn.remat(nn.RMSNorm) if self.ops.recompute else nn.RMSNorm
            q = norm(dtype=q.dtype, name="query_norm")(q)
            k = norm(dtype=k.dtype, name="key_norm")(k)
        if self.relative_bias:
            table = self.param(
                "relative_bias",
                nn.initializers.normal(0.02),  # published: truncated, but at 100 deviations
                (bias_rows(self.grid), self.num_heads),
            )
            bias = self.get_variable("params", xla.BIAS)
            bias = bias_at(table, self.grid) if bias is None else bias
        out = self.ops.attend(q, k, v, bias, None if kept is None else kept.visible)
        out = einops.rearrange(out, "b n h d -> b n (h d)")
        if kept is not None:
            out = masking.take(out, kept)
        return Linear(dim, self.ops, name="proj")(out)
