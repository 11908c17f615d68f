"""Self-attention with MDT's learned two-dimensional relative position bias."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.layers import Linear


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


class Attention(nn.Module):
    """Multi-head self-attention, the bias added to the logits before the softmax.

    grid: (H, W) in tokens, which sizes the bias table. relative_bias: whether there is one.
    """

    num_heads: int
    grid: tuple[int, int]
    relative_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, index: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        """x: [B, N, D]; index: [1 or B, N, N] int32, `relative_index` of the tokens in x.

        seen: [N] bool, the tokens that others may look at; None: all. Returns [B, N, D].
        """
        batch, length, dim = x.shape
        qkv = Linear(3 * dim, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(batch, length, 3 * self.num_heads, -1), 3, axis=2)
        bias = None
        if self.relative_bias:
            table = self.param(
                "relative_bias",
                nn.initializers.normal(0.02),  # published: truncated, but at 100 deviations
                (bias_rows(self.grid), self.num_heads),
            )
            bias = jnp.moveaxis(table[index], -1, 1)  # [1 or B, heads, N, N]
        mask = None if seen is None else seen[None, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)
        return Linear(dim, dtype=self.dtype, name="proj")(out.reshape(batch, length, dim))
