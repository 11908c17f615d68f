"""Stable Diffusion's autoencoder, AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752).

Images [B, H, W, 3] in [−1, 1] ↔ latents [B, H/8, W/8, 4]. Submodules have the names of diffusers'
weight files, so that parameters are converted by a rule.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Stable Diffusion 1.x: 1 / the standard deviation of its VAE's latents.
VAE_SCALE = 0.18215


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and 3×3 convolution, and a shortcut: [B, H, W, C] → [B, H, W, features]."""

    features: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(_norm(self.groups, "norm1")(x)).astype(self.dtype)
        h = _conv(self.features, self.dtype, "conv1")(h)
        h = nn.silu(_norm(self.groups, "norm2")(h)).astype(self.dtype)
        h = _conv(self.features, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, [B, H, W, C] → [B, H, W, C]."""

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, dim = x.shape
        h = _norm(self.groups, "group_norm")(x).astype(self.dtype)
        h = h.reshape(batch, height * width, 1, dim)
        q, k, v = (
            nn.Dense(dim, dtype=self.dtype, name=name)(h) for name in ("to_q", "to_k", "to_v")
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(batch, height, width, dim)
        return x + nn.Dense(dim, dtype=self.dtype, name="to_out_0")(h)


class Middle(nn.Module):
    """Resnet block, attention, resnet block: [B, H, W, C] → [B, H, W, C]."""

    features: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(self.features, self.groups, self.dtype, name="resnets_0")(x)
        x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(self.features, self.groups, self.dtype, name="resnets_1")(x)


class Level(nn.Module):
    """`layers` resnet blocks, then resampling to half ("down") or twice ("up") the size.

    The published network pads only the right and the bottom before it halves.
    """

    features: int
    layers: int
    resample: str
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":
            x = jnp.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
            return _Resampler(self.features, 2, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            return _Resampler(self.features, 1, self.dtype, name="upsamplers_0")(x)
        return x


class _Resampler(nn.Module):
    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        padding = "VALID" if self.stride == 2 else 1
        return nn.Conv(
            self.features, (3, 3), self.stride, padding=padding, dtype=self.dtype, name="conv"
        )(x)


class Encoder(nn.Module):
    """Images [B, H, W, 3] → [B, H/f, W/f, 2·latent_channels], f = 2^(levels − 1)."""

    channels: tuple[int, ...]
    layers: int
    latent_channels: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(self.channels[0], self.dtype, "conv_in")(x)
        last = len(self.channels) - 1
        for i, features in enumerate(self.channels):
            resample = "down" if i < last else ""
            level = Level(features, self.layers, resample, self.groups, self.dtype,
                          name=f"down_blocks_{i}")  # fmt: skip
            x = level(x)
        x = Middle(self.channels[-1], self.groups, self.dtype, name="mid_block")(x)
        x = nn.silu(_norm(self.groups, "conv_norm_out")(x)).astype(self.dtype)
        return _conv(2 * self.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents [B, h, w, latent_channels] → images [B, f·h, f·w, 3], f = 2^(levels − 1)."""

    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = _conv(self.channels[-1], self.dtype, "conv_in")(z)
        x = Middle(self.channels[-1], self.groups, self.dtype, name="mid_block")(x)
        last = len(self.channels) - 1
        for i, features in enumerate(reversed(self.channels)):
            resample = "up" if i < last else ""
            level = Level(features, self.layers + 1, resample, self.groups, self.dtype,
                          name=f"up_blocks_{i}")  # fmt: skip
            x = level(x)
        x = nn.silu(_norm(self.groups, "conv_norm_out")(x)).astype(self.dtype)
        return _conv(3, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder; the defaults are Stable Diffusion 1.x's, with 83,653,863 parameters.

    channels: of each level, from the full size on; layers: resnet blocks of an encoder level;
    groups: of the group norms. dtype: of convolutions and activations; parameters and norms are
    float32.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @property
    def factor(self) -> int:
        """The ratio of the side of an image to the side of its latents."""
        return 2 ** (len(self.channels) - 1)

    def setup(self):
        shape = (self.channels, self.layers)
        self.encoder = Encoder(*shape, self.latent_channels, self.groups, self.dtype)
        self.decoder = Decoder(*shape, self.groups, self.dtype)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, 3] in [−1, 1] → (mean, standard deviation) of the posterior, float32.

        They are not scaled: a diffusion model is trained on (mean + std·noise)·scale.
        """
        moments = self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, latent_channels], not scaled → images float32, about [−1, 1]."""
        z = self.post_quant_conv(latents.astype(self.dtype))
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction of images [B, H, W, 3] from the posterior's mean."""
        return self.decode(self.encode(images)[0])


def _conv(features: int, dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, name=name)
