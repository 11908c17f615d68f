"""Latent diffusion's autoencoder, AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752).

Images [B, H, W, 3] in [−1, 1] ↔ latents [B, H/f, W/f, c]: f = 8 and c = 4 in Stable Diffusion 1 to
XL, c = 16 in Stable Diffusion 3 and Flux, f = 16 and c = 32 in VA-VAE (Yao et al. 2025, arXiv
2501.01423). Submodules have the names of diffusers' weight files, so that parameters are converted
by a rule.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Stable Diffusion 1.x: 1 / the standard deviation of its VAE's latents.
VAE_SCALE = 0.18215


class LatentNorm(NamedTuple):
    """x = scale·(z − shift)/std: what a diffusion model is trained on, of a VAE's latents z.

    shift, std: one number for all channels, or one for each; empty: none.
    """

    scale: float = VAE_SCALE
    shift: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def apply(self, z):
        """Latents [..., C] float32, of NumPy or JAX → normalised."""
        if self.shift:
            z = z - np.asarray(self.shift, np.float32)
        return z * self._factor

    def invert(self, x):
        """Normalised latents [..., C] float32 → latents of the VAE."""
        z = x / self._factor
        return z + np.asarray(self.shift, np.float32) if self.shift else z

    @property
    def _factor(self) -> np.ndarray:
        return np.asarray(self.scale / np.asarray(self.std or 1.0), np.float32)


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and 3×3 convolution, with a shortcut: [B, H, W, C] → [B, H, W, features]."""

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

    attention: each resnet block is followed by attention. The published network pads only the right
    and the bottom before it halves.
    """

    features: int
    layers: int
    resample: str
    attention: bool
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
            if self.attention:
                x = AttentionBlock(self.groups, self.dtype, name=f"attentions_{i}")(x)
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


class Coder(nn.Module):
    """What encoder and decoder share; f = 2^(levels − 1) is the ratio of the sizes."""

    channels: tuple[int, ...]
    layers: int
    out_channels: int
    attention: tuple[int, ...]
    groups: int
    dtype: jnp.dtype = jnp.float32

    def level(self, i: int, size: int, layers: int, name: str) -> Level:
        """Level i, all but the last of which resample. size: its number from the full size on."""
        resample = name if i < len(self.channels) - 1 else ""
        return Level(
            self.channels[size],
            layers,
            resample,
            size in self.attention,
            self.groups,
            self.dtype,
            name=f"{name}_blocks_{i}",
        )

    def middle(self) -> Middle:
        return Middle(self.channels[-1], self.groups, self.dtype, name="mid_block")

    def project(self, x: jax.Array) -> jax.Array:
        x = nn.silu(_norm(self.groups, "conv_norm_out")(x)).astype(self.dtype)
        return _conv(self.out_channels, self.dtype, "conv_out")(x)


class Encoder(Coder):
    """Images [B, H, W, 3] → [B, H/f, W/f, out_channels]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(self.channels[0], self.dtype, "conv_in")(x)
        for i in range(len(self.channels)):
            x = self.level(i, i, self.layers, "down")(x)
        return self.project(self.middle()(x))


class Decoder(Coder):
    """Latents [B, h, w, latent_channels] → images [B, f·h, f·w, out_channels]."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.middle()(_conv(self.channels[-1], self.dtype, "conv_in")(z))
        last = len(self.channels) - 1
        for i in range(last + 1):
            x = self.level(i, last - i, self.layers + 1, "up")(x)
        return self.project(x)


class AutoencoderKL(nn.Module):
    """The autoencoder; the defaults are Stable Diffusion 1.x's, with 83,653,863 parameters.

    channels: of each level, from the full size on; layers: resnet blocks of an encoder level;
    groups: of the group norms; use_quant_conv: whether there are 1×1 convolutions on either side of
    the latents (Stable Diffusion 3's and Flux's have none); attention_levels: the levels whose
    blocks have attention (of VA-VAE's the last one). dtype: of convolutions and activations;
    parameters and norms are float32.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    groups: int = 32
    use_quant_conv: bool = True
    attention_levels: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32

    @property
    def factor(self) -> int:
        """The ratio of the side of an image to the side of its latents."""
        return 2 ** (len(self.channels) - 1)

    def setup(self):
        levels, moments = (self.channels, self.layers), 2 * self.latent_channels
        self.encoder = Encoder(*levels, moments, self.attention_levels, self.groups, self.dtype)
        self.decoder = Decoder(*levels, 3, self.attention_levels, self.groups, self.dtype)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(moments, (1, 1), dtype=self.dtype)
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, 3] in [−1, 1] → (mean, standard deviation) of the posterior, float32.

        They are not normalised, see `LatentNorm`.
        """
        moments = self.encoder(images.astype(self.dtype))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, latent_channels], not normalised → images float32, about [−1, 1]."""
        z = latents.astype(self.dtype)
        return self.decoder(self.post_quant_conv(z) if self.use_quant_conv else z).astype(
            jnp.float32
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction of images [B, H, W, 3] from the posterior's mean."""
        return self.decode(self.encode(images)[0])


def _conv(features: int, dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, name=name)
