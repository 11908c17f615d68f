"""MDT's asymmetric masked diffusion transformer (Gao et al. 2023, arXiv 2303.14389v1).

A patchified latent goes through an encoder, a side-interpolater that fills in masked tokens (in
the masked pass only), and a decoder. The network draws no random numbers: which tokens are kept
and which labels are dropped comes in from outside.
"""

import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from mdt_jax.models import masking
from mdt_jax.models.attention import Attention, relative_index
from mdt_jax.models.embeddings import LabelEmbedder, TimestepEmbedder, sincos_positions
from mdt_jax.models.layers import Linear

SIZES = {
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}


# On a CPU, stacks up to this depth are unrolled: about a third faster, still compiled in seconds.
UNROLL_DEPTH = 8


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """x: [B, H, W, C] → tokens [B, (H/p)·(W/p), p·p·C], row-major, channels last in a token."""
    p = patch_size
    return einops.rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """The inverse of `patchify`: tokens [B, h·w, p·p·C] → [B, h·p, w·p, C]."""
    h, w = grid
    p = patch_size
    return einops.rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=p, q=p)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without affine parameters over the last axis, eps 1e-6, float32 statistics."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x: [B, N, D]; shift, scale: [B, 1, D]."""
    return x * (1 + scale) + shift


class Modulation(nn.Module):
    """`parts` zero-initialised modulations [B, 1, D] of the conditioning c [B, D] (adaLN-Zero)."""

    parts: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, c: jax.Array) -> list[jax.Array]:
        zeros = nn.initializers.zeros
        linear = Linear(
            self.parts * c.shape[-1], kernel_init=zeros, dtype=self.dtype, name="linear"
        )
        return jnp.split(linear(nn.silu(c))[:, None, :], self.parts, axis=-1)


class Block(nn.Module):
    """An adaLN-Zero transformer block whose attention has a relative position bias."""

    num_heads: int
    grid: tuple[int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, index: jax.Array):
        """x: [B, N, D], c: [B, D], index: [1 or B, N, N]. Returns (x, None), as scan wants."""
        dim = x.shape[-1]
        modulation = Modulation(6, self.dtype, name="modulation")(c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        h = modulate(layer_norm(x), shift_attn, scale_attn)
        h = Attention(self.num_heads, self.grid, self.dtype, name="attention")(h, index)
        x = x + gate_attn * h

        h = modulate(layer_norm(x), shift_mlp, scale_mlp)
        h = Linear(4 * dim, dtype=self.dtype, name="mlp_in")(h)
        h = Linear(dim, dtype=self.dtype, name="mlp_out")(nn.gelu(h, approximate=True))
        return x + gate_mlp * h, None


class FinalLayer(nn.Module):
    """Tokens [B, L, D] → [B, L, features], zero at initialisation."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = Modulation(2, self.dtype, name="modulation")(c)
        x = modulate(layer_norm(x), shift, scale)
        zeros = nn.initializers.zeros
        return Linear(self.features, kernel_init=zeros, dtype=self.dtype, name="linear")(x)


class MDT(nn.Module):
    """The noise and variance predictor.

    input_size: (H, W) of x, both divisible by patch_size; in_channels: C of x.
    depth: encoder and decoder blocks together; decoder_layers: how many of them decode.
    num_classes: 0 for an unconditional model; else the null label is `num_classes`.
    dtype: of matmuls and activations; parameters, conditioning, softmax and norms stay float32.
    remat: recompute blocks in the backward pass instead of storing their activations.
    unroll: lay the blocks out one by one instead of scanning them (same parameters and result);
        compiles longer, runs faster on a CPU.
    """

    input_size: tuple[int, int]
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 2
    decoder_layers: int = 2
    num_classes: int = 1000
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: bool = False

    @classmethod
    def from_config(cls, config) -> "MDT":
        """The model of a config (its `model`, `data` and `train` fields)."""
        return cls(
            **config.model,
            input_size=(config.data.image_size, config.data.image_size),
            in_channels=config.data.channels,
            dtype=jnp.dtype(config.train.dtype),
            remat=config.train.remat,
            unroll=jax.default_backend() == "cpu" and config.model.depth <= UNROLL_DEPTH,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def setup(self):
        dim = self.hidden_size
        positions = sincos_positions(self.grid, dim)[None]
        self.patch_embed = Linear(dim, dtype=self.dtype)
        self.pos_embed = self.param("pos_embed", lambda _: jnp.asarray(positions))
        self.decoder_pos_embed = self.param("decoder_pos_embed", lambda _: jnp.asarray(positions))
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (dim,))
        self.timestep_embed = TimestepEmbedder(dim)
        if self.num_classes:
            self.label_embed = LabelEmbedder(self.num_classes, dim)
        self.encoder = self._blocks(self.depth - self.decoder_layers)
        self.side_interpolater = self._blocks(1)
        self.decoder = self._blocks(self.decoder_layers)
        self.final_layer = FinalLayer(2 * self.in_channels * self.patch_size**2, self.dtype)

    def _blocks(self, count: int) -> nn.Module:
        """`count` blocks with stacked parameters, called as `blocks(x, c, index) → (x, None)`."""
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        return nn.scan(
            block,
            length=count,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            unroll=count if self.unroll else 1,
        )(self.num_heads, self.grid, self.dtype)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None = None,
        keep_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Predict noise and variance.

        x: [B, H, W, C] noised latents; t: [B] timesteps 0…T−1; y: [B] int labels, `num_classes`
        being the null label (ignored by an unconditional model).
        keep_ids: None for the full pass, or [B, K] int32, the tokens the encoder sees.
        Returns [B, H, W, 2C] float32: noise in the first C channels, variance in the others.
        """
        c = self.timestep_embed(t)
        if self.num_classes:
            c = c + self.label_embed(y)
        full_index = relative_index(self.grid)[None]
        tokens = self.patch_embed(patchify(x, self.patch_size))
        tokens = tokens + self.pos_embed.astype(tokens.dtype)
        decoder_pos = self.decoder_pos_embed.astype(tokens.dtype)

        if keep_ids is None:
            tokens, _ = self.encoder(tokens, c, full_index)
            tokens = tokens + decoder_pos
        else:
            kept = masking.gather_tokens(tokens, keep_ids)
            kept_index = jnp.asarray(full_index[0])[keep_ids[:, :, None], keep_ids[:, None, :]]
            kept, _ = self.encoder(kept, c, kept_index)
            tokens = masking.scatter_tokens(kept, keep_ids, self.mask_token, self.num_tokens)
            tokens = self._interpolate(tokens + decoder_pos, c, keep_ids, full_index)

        tokens, _ = self.decoder(tokens, c, full_index)
        out = self.final_layer(tokens, c).astype(jnp.float32)
        return unpatchify(out, self.grid, self.patch_size)

    def _interpolate(self, tokens, c, keep_ids, index):
        """Side-interpolater with the masked shortcut: only masked tokens take its prediction."""
        predicted, _ = self.side_interpolater(tokens, c, index)
        masked = masking.masked_positions(keep_ids, self.num_tokens)[:, :, None]
        return jnp.where(masked, predicted, tokens)


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: MDT, key: jax.Array) -> dict:
    """Fresh float32 parameters of every part, the training-only ones included."""
    x = jnp.zeros((1, *model.input_size, model.in_channels))
    zero = jnp.zeros((1,), jnp.int32)
    # A masked pass reaches every part.
    return model.init(key, x, zero, zero, keep_ids=jnp.zeros((1, 1), jnp.int32))["params"]
