"""MDT's asymmetric masked diffusion transformer (Gao et al. 2023, arXiv 2303.14389 v1 and v2).

patchify → encoder → side-interpolater (in the masked pass only: it predicts the masked tokens) →
decoder → unpatchify. MDTv2 adds long skips within the encoder and skips from the input to the
decoder. The network draws no random numbers: the caller passes the kept tokens and drops labels.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from mdt_jax.models import masking, xla
from mdt_jax.models.attention import bias_at
from mdt_jax.models.blocks import Block, FinalLayer
from mdt_jax.models.embeddings import LabelEmbedder, TimestepEmbedder, sincos_positions
from mdt_jax.models.layers import EPS, Linear
from mdt_jax.models.xla import Ops

SIZES = {
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}

# The parameters that are stacks of blocks.
STACKS = ("encoder", "encoder_in", "encoder_out", "decoder", "side_interpolater")


def image_sides(config) -> tuple[int, int]:
    """(H, W) of a config's images."""
    return config.data.image_size, config.data.image_width or config.data.image_size


def input_shape(config) -> tuple[int, int, int]:
    """(H, W, C) of a config's training data: of its images, or of the VAE's latents."""
    height, width = image_sides(config)
    if config.vae.path == "identity":
        return height, width, config.data.channels
    return height // config.vae.factor, width // config.vae.factor, config.vae.channels


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """x [B, H, W, C] → tokens [B, (H/p)·(W/p), p·p·C], row-major, channels last in a token."""
    p = patch_size
    return einops.rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """The inverse of `patchify`: tokens [B, h·w, p·p·C] → [B, h·p, w·p, C]."""
    h, w = grid
    p = patch_size
    return einops.rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=p, q=p)


class MDT(nn.Module):
    """The network that predicts noise, or what else it is trained for, and variance.

    input_size: (H, W) of x, both divisible by patch_size; in_channels: C of x.
    depth: blocks of encoder and decoder together; decoder_layers: blocks of the decoder. With
        decoder_layers=0 the network is a DiT (Peebles & Xie 2023), which has no masked pass.
    num_classes: 0 for an unconditional model; otherwise the null label is `num_classes`.
    version: "v1", or "v2": the encoder has long skips, which require an even number of encoder
        blocks, and every decoder block has a skip from the unmasked input.
    side_layers: blocks of the side-interpolater; 0: the decoder gets the mask tokens themselves.
    masked_shortcut: the side-interpolater replaces masked tokens only.
    relative_bias: attention has a relative position bias. qk_norm: it normalises queries and keys.
    learned_position: the two position embeddings are trained.
    asymmetric: False: in the masked pass the decoder sees the kept tokens only, and the
        side-interpolater follows the decoder.
    learn_sigma: False: the network predicts noise alone, and all variance channels are 1, which is
        the upper bound of the learned variance, β_t (DiT with learn_sigma=False).
    timestep_shift, mlp_norm_eps: of the timesteps' frequencies (see `timestep_features`), and the
        epsilon of the norm before each MLP. In diffusers' DiT they are 1 and 1e-5.
    dtype: of matmuls and activations, the blocks' modulations included. Parameters, conditioning,
        softmax and norms are float32.

    The other fields change how XLA computes the network, not its result (see `models.xla`):
    remat: what the backward pass recomputes of each block, a key of `xla.REMAT`.
    gather: where devices share the parameters, the function that gathers a tree of them. It is
        applied block by block, and again in the backward pass.
    attention: "auto" for the fastest form of attention that the devices have, or "plain".
    unroll: compile the blocks one by one instead of a scan: slower to compile, but faster.
    modulate_first: compute the modulations of many sampling steps before their loop.
    ops: how operations are computed.
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
    qk_norm: bool = False
    learned_position: bool = True
    asymmetric: bool = True
    learn_sigma: bool = True
    timestep_shift: int = 0
    mlp_norm_eps: float = EPS
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    gather: Callable[[dict], dict] | None = None
    attention: str = "auto"
    unroll: bool = False
    modulate_first: bool = False
    ops: Ops = Ops()

    @classmethod
    def from_config(cls, config) -> "MDT":
        """The model of a config, from its `model`, `mask`, `data`, `vae` and `train` fields."""
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
            attention=config.train.attention,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def setup(self):
        dim, ops = self.hidden_size, self.ops._replace(dtype=self.dtype)
        sincos = jnp.asarray(sincos_positions(self.grid, dim)[None])

        def position_embedding(name):
            return self.param(name, lambda _: sincos) if self.learned_position else sincos

        self.patch_embed = Linear(dim, ops)
        self.pos_embed = position_embedding("pos_embed")
        self.timestep_embed = TimestepEmbedder(dim, self.timestep_shift)
        if self.num_classes:
            self.label_embed = LabelEmbedder(self.num_classes, dim)
        encoder_layers = self.depth - self.decoder_layers
        if self.version == "v2":
            if encoder_layers % 2:
                raise ValueError(
                    f"v2 requires an even number of encoder blocks, got {encoder_layers}"
                )
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
        channels = (1 + self.learn_sigma) * self.in_channels
        self.final_layer = FinalLayer(channels * self.patch_size**2, ops)

    def _blocks(self, count: int, skip_axis=nn.broadcast) -> nn.Module:
        """`count` blocks with stacked parameters, called as one `Block`.

        Returns (x, the x after each block [count, B, N, D]). skip_axis=0: skip is
        [count, B, N, D], one for each block; otherwise the blocks share one.
        """
        blocks = xla.stack_blocks(Block, count, skip_axis, self.remat, self.gather, self.unroll)
        ops = self.ops._replace(dtype=self.dtype)
        return blocks(
            self.num_heads, self.grid, self.relative_bias, ops, self.mlp_norm_eps, self.qk_norm
        )

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None = None,
        keep_ids: jax.Array | None = None,
        keep_count: jax.Array | None = None,
    ) -> jax.Array:
        """Predict noise, or what else the network is trained for, and variance.

        x: [B, H, W, C] noisy images or latents; t: [B] timesteps in 0…T−1; y: [B] int labels,
            `num_classes` being the null label (an unconditional model ignores them).
        keep_ids: None for the full pass, or the tokens the encoder sees, [B, K] int32.
        keep_count: [] int32 in 1…K, possibly traced: the encoder sees only the first `keep_count`
            of keep_ids. One program of static length K thus serves every length up to K.
        Returns [B, H, W, 2C] float32: noise in the first C channels, variance in the others.
        """
        c, inputs = self._inputs(x, t, y)
        if keep_ids is not None:
            kept = masking.kept_tokens(keep_ids, keep_count, self.num_tokens)
            return self._output(self._masked_pass(inputs, c, kept), c)
        return self._output(self._decode_all(self._encode(inputs, c), inputs, c), c)

    def reusing(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """(the full pass, the residual of the encoder): what the encoder adds to its input.

        x, t, y: as of a call. residual: [B, L, D], to be added instead of evaluating the encoder.
        """
        c, inputs = self._inputs(x, t, y)
        added = self._encode(inputs, c) - inputs if residual is None else residual
        return self._output(self._decode_all(inputs + added, inputs, c), c), added

    def _inputs(self, x, t, y):
        """(the conditioning [B, D], the tokens of x [B, L, D] with their positions)."""
        c = self.conditioning(t, y)
        inputs = self.patch_embed(patchify(x, self.patch_size))
        return c, inputs + self.pos_embed.astype(inputs.dtype)

    def _decode_all(self, tokens, inputs, c):
        """The decoder of a full pass; a DiT has none."""
        if not self.decoder_layers:
            return tokens
        return self._decode(tokens + self.decoder_pos_embed.astype(tokens.dtype), inputs, c)

    def _output(self, tokens, c):
        """Tokens [B, L, D] → what is predicted, and variance: [B, H, W, 2C] float32."""
        out = self.final_layer(tokens, c).astype(jnp.float32)
        out = unpatchify(out, self.grid, self.patch_size)
        return out if self.learn_sigma else jnp.concatenate([out, jnp.ones_like(out)], axis=-1)

    def conditioning(self, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """The conditioning [B, D] float32 of timesteps and labels [B]."""
        c = self.timestep_embed(t)
        if self.num_classes:
            c = c + self.label_embed(cast(jax.Array, y))  # a class-conditional model requires y
        return c

    def _masked_pass(self, inputs, c, kept):
        """The tokens [B, L, D] for the final layer from the kept ones among `inputs` [B, L, D]."""
        if not self.decoder_layers:
            raise ValueError("a model without decoder blocks (a DiT) has no masked pass")
        visible = kept.visible[:, :, None]
        decoder_pos = self.decoder_pos_embed.astype(inputs.dtype)
        mask_token = self.mask_token.astype(inputs.dtype)
        few = masking.take(inputs, kept)

        tokens = self._encode(few, c, kept)
        if self.asymmetric:
            tokens = jnp.where(visible, masking.put(tokens, kept), mask_token)
            tokens = self._interpolate(tokens + decoder_pos, c, visible)
            return self._decode(tokens, inputs, c)
        tokens = tokens + masking.take(jnp.broadcast_to(decoder_pos, inputs.shape), kept)
        tokens = masking.put(self._decode(tokens, few, c, kept), kept)
        tokens = jnp.where(visible, tokens, mask_token + decoder_pos)
        return self._interpolate(tokens, c, visible)

    def _encode(self, tokens, c, kept=None):
        if self.version == "v1":
            return self.encoder(tokens, c, kept, None)[0]
        tokens, skips = self.encoder_in(tokens, c, kept, None)
        # Last in, first out: the first block of the second half has its own input as its skip.
        return self.encoder_out(tokens, c, kept, skips[::-1])[0]

    def _interpolate(self, tokens, c, visible):
        """The side-interpolater; with the masked shortcut, kept tokens bypass it."""
        if not self.side_layers:
            return tokens
        predicted, _ = self.side_interpolater(tokens, c, None, None)
        return jnp.where(visible, tokens, predicted) if self.masked_shortcut else predicted

    def _decode(self, tokens, inputs, c, kept=None):
        return self.decoder(tokens, c, kept, inputs if self.version == "v2" else None)[0]

    def unstack_blocks(self, params: dict) -> Callable[[], dict]:
        """The function that returns `params`; see `xla.unstack_blocks` for unrolled blocks."""
        return xla.unstack_blocks(params, STACKS) if self.unroll else lambda: params

    def prepare(self, params: dict) -> dict:
        """`params` with what all passes of a step share computed once; see `xla.DERIVED`.

        Where devices share parameters, those that belong to no block are gathered.
        """
        gather: Callable[[Any], Any] = self.gather or (lambda tree: tree)
        blocks = {name: tree for name, tree in params.items() if name in STACKS}
        others = gather({name: tree for name, tree in params.items() if name not in STACKS})
        biases = 4 * (self.depth + self.side_layers) * self.num_heads * self.num_tokens**2
        if self.relative_bias and biases <= xla.BIAS_BYTES:
            look_up = jax.vmap(functools.partial(bias_at, grid=self.grid))
            for name, stack in blocks.items():
                bias = look_up(gather(stack["attention"]["relative_bias"]))
                bias = bias.astype(self.ops.bias_dtype)
                blocks[name] = {**stack, "attention": {**stack["attention"], xla.BIAS: bias}}
        return others | xla.with_casts(blocks, self.dtype)

    def modulations(self, params: dict, c: jax.Array) -> dict:
        """The modulations of all blocks for conditioning c [B, D]: {stack: [blocks, B, 6D]}.

        params: as `prepare` returns them. `with_modulations` uses the result.
        """
        ops = self.ops._replace(dtype=self.dtype)
        linear = Linear(6 * self.hidden_size, ops, parent=None)

        def of_block(params):
            return linear.apply({"params": params}, nn.silu(c))

        stacks = [name for name in STACKS if name in params and name != "side_interpolater"]
        return {name: jax.vmap(of_block)(params[name]["modulation"]["linear"]) for name in stacks}

    def with_modulations(self, params: dict, modulations: dict) -> dict:
        """`params` with the blocks' modulations, which need not be computed then."""
        return params | {
            name: {**params[name], "modulation": {xla.MODULATION: values}}
            for name, values in modulations.items()
        }


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: MDT, key: jax.Array) -> dict:
    """Initial float32 parameters of all parts, those used in training only included."""
    x = jnp.zeros((1, *model.input_size, model.in_channels))
    zero = jnp.zeros((1,), jnp.int32)
    # A masked pass reaches every part.
    keep_ids = jnp.zeros((1, 1), jnp.int32) if model.decoder_layers else None
    return cast(dict, model.init(key, x, zero, zero, keep_ids=keep_ids)["params"])
