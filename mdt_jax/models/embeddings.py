"""Embeddings of timesteps, labels and token positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.layers import Linear


def sincos_positions(grid: tuple[int, int], dim: int) -> np.ndarray:
    """2-D sine-cosine position embedding (MAE, He et al. 2021), [H·W, dim] float32, row-major.

    The first half of the channels encodes x (the column), the second half y (the row), each as
    `[sin, cos]` with frequencies 10000^(−i / (dim/4)). `dim` must be a multiple of 4.
    """
    height, width = grid
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    halves = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def timestep_features(t: jax.Array, shift: int = 0) -> jax.Array:
    """Sinusoids of timesteps t [B] in 0…T−1: [B, 256] float32, `[cos, sin]`, as in ADM.

    The frequencies are 10000^(−i/(128 − shift)), i = 0…127.
    """
    half = 128
    # The published code rounds the exponent to float32 before exp.
    exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32)
    exponent = exponent / np.float32(half - shift)
    angles = t.astype(jnp.float32)[:, None] * np.exp(exponent)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Timesteps [B] → [B, dim] float32: sinusoids, Linear, SiLU, Linear.

    shift: as of `timestep_features`.
    """

    dim: int
    shift: int = 0

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        x = timestep_features(t, self.shift)
        x = Linear(self.dim, kernel_init=init, name="in_proj")(x)
        return Linear(self.dim, kernel_init=init, name="out_proj")(nn.silu(x))


class LabelEmbedder(nn.Module):
    """Labels [B] in 0…num_classes → [B, dim] float32; `num_classes` is the null label."""

    num_classes: int
    dim: int

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return nn.Embed(self.num_classes + 1, self.dim, embedding_init=init, name="table")(y)
