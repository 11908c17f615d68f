"""MDT's asymmetric masked diffusion transformer (Gao et al. 2023, arXiv 2303.14389 v1 and v2).

A patchified latent goes through an encoder, a side-interpolater that fills in masked tokens (in
the masked pass only), and a decoder. MDTv2 adds long skips within the encoder and skips from the
input into the decoder. The network draws no random numbers: which tokens are kept and which labels
are dropped comes in from outside.
"""

import functools
from collections.abc import Callable
from typing import cast

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from mdt_jax.models import masking
from mdt_jax.models.attention import Attention, Positions, positions
from mdt_jax.models.embeddings import LabelEmbedder, TimestepEmbedder, sincos_positions
from mdt_jax.models.layers import LINEAR, Linear, add_gated, gelu, gradient_barrier, modulated_norm

SIZES = {
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}


# The Stable Diffusion VAE: latents of 4 channels, an eighth of the image's height and width.
VAE_FACTOR, VAE_CHANNELS = 8, 4

# On a CPU, stacks up to this depth are unrolled: about a third faster, still compiled in seconds.
UNROLL_DEPTH = 12


STACKS = ("encoder", "encoder_in", "encoder_out", "decoder", "side_interpolater")  # of blocks

# With `MDT.gather`: how parameters were brought together and cast is not kept in any case.
REGATHERED = ("sharding_constraint", "convert_element_type")

# What the backward pass keeps of each block; the rest it recomputes from the block's input. "dots"
# keeps what Linear layers give, and recomputes the attention and all that is elementwise.
REMAT = {
    "none": lambda primitive, *_, **__: primitive.name not in REGATHERED,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def input_shape(config) -> tuple[int, int, int]:
    """(H, W, C) of what the model of a config is trained on: pixels, or a VAE's latents."""
    size = config.data.image_size
    if config.vae.path == "identity":
        return size, size, config.data.channels
    return size // VAE_FACTOR, size // VAE_FACTOR, VAE_CHANNELS


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """x: [B, H, W, C] → tokens [B, (H/p)·(W/p), p·p·C], row-major, channels last in a token."""
    p = patch_size
    return einops.rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """The inverse of `patchify`: tokens [B, h·w, p·p·C] → [B, h·p, w·p, C]."""
    h, w = grid
    p = patch_size
    return einops.rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=p, q=p)


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
    relative_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c: jax.Array,
        where: Positions,
        seen: jax.Array | None = None,
        skip: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """x, skip: [B, N, D]; c: [B, D]; where and seen: see `Attention`.

        A block with a skip starts with Linear(2D → D) on [x, skip]. Returns the new x twice, as
        nn.scan wants it: what goes on, and what a later block may take as its skip.
        """
        dim = x.shape[-1]
        if skip is not None:
            both = jnp.concatenate([x, skip], axis=-1)
            x = Linear(dim, dtype=self.dtype, name="skip_linear")(both)
        modulation = Modulation(6, self.dtype, name="modulation")(c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        x = gradient_barrier(x)
        h = modulated_norm(x, shift_attn, scale_attn)
        attention = Attention(
            self.num_heads, self.grid, self.relative_bias, self.dtype, name="attention"
        )
        x = add_gated(x, gate_attn, attention(h, where, seen))

        x = gradient_barrier(x)
        h = modulated_norm(x, shift_mlp, scale_mlp)
        h = Linear(4 * dim, dtype=self.dtype, name="mlp_in")(h)
        h = Linear(dim, dtype=self.dtype, name="mlp_out")(gelu(h))
        x = add_gated(x, gate_mlp, h)
        return x, x


class FinalLayer(nn.Module):
    """Tokens [B, L, D] → [B, L, features], zero at initialisation."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = Modulation(2, self.dtype, name="modulation")(c)
        x = modulated_norm(x, shift, scale)
        zeros = nn.initializers.zeros
        return Linear(self.features, kernel_init=zeros, dtype=self.dtype, name="linear")(x)


class MDT(nn.Module):
    """The noise and variance predictor.

    input_size: (H, W) of x, both divisible by patch_size; in_channels: C of x.
    depth: encoder and decoder blocks together; decoder_layers: how many of them decode. With
        decoder_layers=0 it is a DiT (Peebles & Xie 2023), which has no masked pass.
    num_classes: 0 for an unconditional model; else the null label is `num_classes`.
    version: "v2" gives the encoder long skips, for which it needs an even number of blocks, and
        every decoder block a skip from the unmasked input.
    side_layers: blocks of the side-interpolater; 0: mask tokens go to the decoder as they are.
    masked_shortcut: only masked tokens take what the side-interpolater predicts.
    relative_bias, learned_position: the bias of the attention is there; the two position
        embeddings are trained.
    asymmetric: False lets the masked pass decode the kept tokens alone, and put the
        side-interpolater after the decoder.
    dtype: of matmuls and activations, and so of the modulations that each block makes of the
        conditioning; parameters, the conditioning itself, softmax and norms stay float32.
    remat: what the backward pass recomputes of each block, see `REMAT`.
    gather: where devices share the parameters, the function of a tree of them that brings them
        together: block by block, and again in the backward pass.
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
    version: str = "v1"
    side_layers: int = 1
    masked_shortcut: bool = True
    relative_bias: bool = True
    learned_position: bool = True
    asymmetric: bool = True
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    gather: Callable[[dict], dict] | None = None
    unroll: bool = False

    @classmethod
    def from_config(cls, config) -> "MDT":
        """The model of a config (its `model`, `mask`, `data`, `vae` and `train` fields)."""
        fields = config.model.to_dict()
        if not fields.pop("side_interpolater"):
            fields["side_layers"] = 0
        height, width, channels = input_shape(config)
        return cls(
            **fields,
            input_size=(height, width),
            in_channels=channels,
            asymmetric=config.mask.asymmetric,
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
        sincos = jnp.asarray(sincos_positions(self.grid, dim)[None])

        def position_embedding(name):
            return self.param(name, lambda _: sincos) if self.learned_position else sincos

        self.patch_embed = Linear(dim, dtype=self.dtype)
        self.pos_embed = position_embedding("pos_embed")
        self.timestep_embed = TimestepEmbedder(dim)
        if self.num_classes:
            self.label_embed = LabelEmbedder(self.num_classes, dim)
        encoder_layers = self.depth - self.decoder_layers
        if self.version == "v2":
            if encoder_layers % 2:
                raise ValueError(f"v2 needs an even number of encoder blocks, not {encoder_layers}")
            self.encoder_in = self._blocks(encoder_layers // 2)
            self.encoder_out = self._blocks(encoder_layers // 2, skip_axis=0)
        else:
            self.encoder = self._blocks(encoder_layers)
        if self.decoder_layers:
            self.decoder_pos_embed = position_embedding("decoder_pos_embed")
            self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (dim,))
            self.decoder = self._blocks(self.decoder_layers)
            if self.side_layers:
                self.side_interpolater = self._blocks(self.side_layers)
        self.final_layer = FinalLayer(2 * self.in_channels * self.patch_size**2, self.dtype)

    def _blocks(self, count: int, skip_axis=nn.broadcast) -> nn.Module:
        """`count` blocks with stacked parameters, called as a `Block` is.

        Returns (x, the x after each block [count, B, N, D]). skip_axis=0: each block has its own
        skip, [count, B, N, D] in all; else they share one.
        """
        block = Block
        if self.gather is not None:
            block = nn.map_variables(Block, "params", self.gather)
        if self.remat != "none" or self.gather is not None:
            # Without a loop around it, what is recomputed would be found to be there already.
            block = nn.remat(block, prevent_cse=self.unroll, policy=REMAT[self.remat])
        shared = nn.broadcast
        # Flax takes a tuple of axes, but is annotated by its default of 0.
        return nn.scan(
            block,
            length=count,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(shared, shared, shared, skip_axis),  # pyright: ignore[reportArgumentType]
            unroll=count if self.unroll else 1,
        )(self.num_heads, self.grid, self.relative_bias, self.dtype)

    def unstack_blocks(self, params: dict) -> Callable[[], dict]:
        """Takes the stacked parameters of laid out blocks apart; what it returns stacks them again.

        XLA sees that the two cancel out: a loop in which they are stacked has each block's as they
        are, and does not slice them in each turn.
        """
        if not self.unroll:
            return lambda: params
        stacks = {name: tree for name, tree in params.items() if name in STACKS}
        leaves, tree = jax.tree.flatten(stacks)
        each = [list(leaf) for leaf in leaves]
        return lambda: params | jax.tree.unflatten(tree, [jnp.stack(leaf) for leaf in each])

    def gather_unstacked(self, params: dict) -> dict:
        """The parameters with those brought together that belong to no block."""
        if self.gather is None:
            return params
        rest = {name: tree for name, tree in params.items() if name not in STACKS}
        return {**params, **self.gather(rest)}

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None = None,
        keep_ids: jax.Array | None = None,
        keep_count: jax.Array | None = None,
    ) -> jax.Array:
        """Predict noise and variance.

        x: [B, H, W, C] noised latents; t: [B] timesteps 0…T−1; y: [B] int labels, `num_classes`
        being the null label (ignored by an unconditional model).
        keep_ids: None for the full pass, or [B, K] int32, the tokens the encoder sees.
        keep_count: [] int32 in 1…K, possibly traced: the encoder sees the first `keep_count` of
        keep_ids only. So one program, of static length K, serves every length up to K.
        Returns [B, H, W, 2C] float32: noise in the first C channels, variance in the others.
        """
        c = self.timestep_embed(t)
        if self.num_classes:
            c = c + self.label_embed(cast(jax.Array, y))  # a model of classes is given them
        everywhere = positions(self.grid)
        inputs = self.patch_embed(patchify(x, self.patch_size))
        inputs = inputs + self.pos_embed.astype(inputs.dtype)
        if keep_ids is not None:
            tokens = self._masked_pass(inputs, c, everywhere, keep_ids, keep_count)
        else:
            tokens = self._encode(inputs, c, everywhere)
            if self.decoder_layers:
                tokens = tokens + self.decoder_pos_embed.astype(tokens.dtype)
                tokens = self._decode(tokens, inputs, c, everywhere)
        out = self.final_layer(tokens, c).astype(jnp.float32)
        return unpatchify(out, self.grid, self.patch_size)

    def _encode(self, tokens, c, where, seen=None):
        if self.version == "v1":
            return self.encoder(tokens, c, where, seen, None)[0]
        tokens, skips = self.encoder_in(tokens, c, where, seen, None)
        # Last in, first out: the first block of the second half gets its own input once more.
        return self.encoder_out(tokens, c, where, seen, skips[::-1])[0]

    def _decode(self, tokens, inputs, c, where, seen=None):
        skip = inputs if self.version == "v2" else None
        return self.decoder(tokens, c, where, seen, skip)[0]

    def _masked_pass(self, inputs, c, everywhere, keep_ids, keep_count):
        """Tokens [B, L, D] for the final layer, from those of `inputs` that are kept."""
        if not self.decoder_layers:
            raise ValueError("a model without decoder blocks (a DiT) has no masked pass")
        kept = masking.gather_tokens(inputs, keep_ids)
        kept_positions = positions(self.grid, keep_ids)
        seen = None if keep_count is None else jnp.arange(keep_ids.shape[1]) < keep_count
        back = masking.places(keep_ids, keep_count, self.num_tokens)
        masked = masking.masked_positions(back, self.num_tokens)[:, :, None]
        decoder_pos = self.decoder_pos_embed.astype(inputs.dtype)

        tokens = self._encode(kept, c, kept_positions, seen)
        if self.asymmetric:
            tokens = masking.scatter_tokens(tokens, back, self.mask_token, self.num_tokens)
            tokens = self._interpolate(tokens + decoder_pos, c, everywhere, masked)
            return self._decode(tokens, inputs, c, everywhere)
        tokens = self._decode(tokens + decoder_pos[0][keep_ids], kept, c, kept_positions, seen)
        tokens = masking.scatter_tokens(tokens, back, self.mask_token, self.num_tokens)
        return self._interpolate(
            jnp.where(masked, tokens + decoder_pos, tokens), c, everywhere, masked
        )

    def _interpolate(self, tokens, c, everywhere, masked):
        """The side-interpolater, with the masked shortcut: kept tokens pass it by."""
        if not self.side_layers:
            return tokens
        predicted, _ = self.side_interpolater(tokens, c, everywhere, None, None)
        return jnp.where(masked, predicted, tokens) if self.masked_shortcut else predicted


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: MDT, key: jax.Array) -> dict:
    """Fresh float32 parameters of every part, the training-only ones included."""
    x = jnp.zeros((1, *model.input_size, model.in_channels))
    zero = jnp.zeros((1,), jnp.int32)
    # A masked pass reaches every part.
    keep_ids = jnp.zeros((1, 1), jnp.int32) if model.decoder_layers else None
    return cast(dict, model.init(key, x, zero, zero, keep_ids=keep_ids)["params"])
