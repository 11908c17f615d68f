"""FID's Inception: the network of 2015 with which TensorFlow's and ADM's evaluators measure.

Szegedy et al. 2016 (arXiv 1512.00567), in the graph of Heusel et al. 2017, with the module names of
its port to PyTorch. It differs from torchvision's network: average pools exclude the padding, the
last block uses a max pool, and images are resized as in TensorFlow 1.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # images are resized to SIZE × SIZE
SPATIAL_CHANNELS = 7  # of Mixed_6d's 1×1 branch, whose 17×17 positions are sFID's features
POOL, SPATIAL = 2048, 17 * 17 * SPATIAL_CHANNELS  # numbers of features

# Where to get the weights, for messages.
WHERE = (
    "pt_inception-2015-12-05-6726825d.pth at "
    "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
)


class Features(NamedTuple):
    """pool: [B, 2048]; spatial: [B, 2023], sFID's; logits: [B, num_classes], without their bias."""

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


def resize_bilinear(images: jax.Array, size: int) -> jax.Array:
    """TensorFlow 1's bilinear resize: output pixel i samples input position i·(old/new), without
    the half-pixel offset.

    images: [B, H, W, C] float32. Returns [B, size, size, C].
    """
    rows, columns = (_resize_weights(side, size) for side in images.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    images = jnp.einsum("sh,bhwc->bswc", rows, images, precision=highest)
    return jnp.einsum("tw,bswc->bstc", columns, images, precision=highest)


def _resize_weights(old: int, new: int) -> np.ndarray:
    """[new, old] float32: how much each old pixel of a row contributes to each new one."""
    # TensorFlow computes the scale and the positions in float32, too.
    positions = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    low = np.floor(positions).astype(int)
    high, fraction = np.minimum(low + 1, old - 1), positions - low
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new), low), 1 - fraction)
    np.add.at(weights, (np.arange(new), high), fraction)
    return weights


class BatchNorm(nn.Module):
    """(x − mean)·scale/√(var + 1e-3) + bias; all four are stored parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            use_bias=False,
            precision="highest",
            name="conv",
        )
        return nn.relu(BatchNorm(name="bn")(conv(x)))


def _max_pool(x: jax.Array, stride: int = 2, padding: str = "VALID") -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean_pool(x: jax.Array) -> jax.Array:
    """3×3, stride 1; at the borders the mean of the pixels inside the image."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _concat(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nn.Module):
    """[B, 35, 35, C] → [B, 35, 35, 224 + pool_features]."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = ConvNorm(64, name="branch1x1")(x)
        five = ConvNorm(48, name="branch5x5_1")(x)
        five = ConvNorm(64, (5, 5), name="branch5x5_2")(five)
        double = ConvNorm(64, name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(double)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_3")(double)
        pool = ConvNorm(self.pool_features, name="branch_pool")(_mean_pool(x))
        return _concat(one, five, double, pool)


class InceptionB(nn.Module):
    """[B, 35, 35, C] → [B, 17, 17, 480 + C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvNorm(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        double = ConvNorm(64, name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(double)
        double = ConvNorm(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double)
        return _concat(three, double, _max_pool(x))


class InceptionC(nn.Module):
    """[B, 17, 17, C] → [B, 17, 17, 768], of which the first 192 are the 1×1 branch."""

    mid_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mid = self.mid_features
        one = ConvNorm(192, name="branch1x1")(x)
        seven = ConvNorm(mid, name="branch7x7_1")(x)
        seven = ConvNorm(mid, (1, 7), name="branch7x7_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7_3")(seven)
        double = ConvNorm(mid, name="branch7x7dbl_1")(x)
        double = ConvNorm(mid, (7, 1), name="branch7x7dbl_2")(double)
        double = ConvNorm(mid, (1, 7), name="branch7x7dbl_3")(double)
        double = ConvNorm(mid, (7, 1), name="branch7x7dbl_4")(double)
        double = ConvNorm(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = ConvNorm(192, name="branch_pool")(_mean_pool(x))
        return _concat(one, seven, double, pool)


class InceptionD(nn.Module):
    """[B, 17, 17, C] → [B, 8, 8, 512 + C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvNorm(192, name="branch3x3_1")(x)
        three = ConvNorm(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = ConvNorm(192, name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return _concat(three, seven, _max_pool(x))


class InceptionE(nn.Module):
    """[B, 8, 8, C] → [B, 8, 8, 2048]."""

    use_max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = ConvNorm(320, name="branch1x1")(x)
        three = ConvNorm(384, name="branch3x3_1")(x)
        three = _concat(
            ConvNorm(384, (1, 3), name="branch3x3_2a")(three),
            ConvNorm(384, (3, 1), name="branch3x3_2b")(three),
        )
        double = ConvNorm(448, name="branch3x3dbl_1")(x)
        double = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(double)
        double = _concat(
            ConvNorm(384, (1, 3), name="branch3x3dbl_3a")(double),
            ConvNorm(384, (3, 1), name="branch3x3dbl_3b")(double),
        )
        pool = _max_pool(x, 1, "SAME") if self.use_max_pool else _mean_pool(x)
        return _concat(one, three, double, ConvNorm(192, name="branch_pool")(pool))


class Logits(nn.Module):
    """x·kernel; like TensorFlow's and ADM's Inception Score it leaves out the stored bias."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.dot(x, kernel, precision="highest")


class Inception(nn.Module):
    """The whole network, in float32."""

    num_classes: int = 1008

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """images: [B, H, W, 3], values from 0 to 255, of any real type."""
        x = (resize_bilinear(images.astype(jnp.float32), SIZE) - 128) / 128
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = ConvNorm(80, name="Conv2d_3b_1x1")(_max_pool(x))
        x = ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = InceptionA(32, name="Mixed_5b")(_max_pool(x))
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)
        x = InceptionB(name="Mixed_6a")(x)
        x = InceptionC(128, name="Mixed_6b")(x)
        x = InceptionC(160, name="Mixed_6c")(x)
        x = InceptionC(160, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = InceptionC(192, name="Mixed_6e")(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(use_max_pool=False, name="Mixed_7b")(x)
        x = InceptionE(use_max_pool=True, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        return Features(pool, spatial, Logits(self.num_classes, name="fc")(pool))
