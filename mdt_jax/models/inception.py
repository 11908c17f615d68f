"""FID's Inception: the network of 2015 by which TensorFlow's and ADM's evaluators measure.

Szegedy et al. 2016 (arXiv 1512.00567), in the graph that Heusel et al. 2017 used, with the names of
its port to PyTorch. It differs from torchvision's: average pools leave padding out of the count,
the last block pools by maximum, and images are resized as TensorFlow 1 did.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # what images are resized to
SPATIAL_CHANNELS = 7  # of Mixed_6d's 1×1 branch, whose 17×17 positions are sFID's features
POOL, SPATIAL = 2048, 17 * 17 * SPATIAL_CHANNELS  # how many features there are

# Where the file is, for messages.
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
    """TensorFlow 1's bilinear resize: pixel i is taken at i·(old/new), no half pixels.

    images: [B, H, W, C] float32 → [B, size, size, C].
    """

    def weights(old: int) -> np.ndarray:
        # The scale and the positions are float32 there, too.
        at = np.arange(size, dtype=np.float32) * (np.float32(old) / np.float32(size))
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, old - 1), at - low
        matrix = np.zeros((size, old), np.float32)
        np.add.at(matrix, (np.arange(size), low), 1 - share)
        np.add.at(matrix, (np.arange(size), high), share)
        return matrix

    rows, columns = (jnp.asarray(weights(side)) for side in images.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    images = jnp.einsum("sh,bhwc->bswc", rows, images, precision=highest)
    return jnp.einsum("tw,bswc->bstc", columns, images, precision=highest)


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation with stored statistics (ε 1e-3), ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features, self.kernel, self.stride, self.padding, use_bias=False,
            precision="highest", name="conv",
        )(x)  # fmt: skip
        return nn.relu(Norm(name="bn")(x))


class Norm(nn.Module):
    """(x − mean)·scale/√(var + 1e-3) + bias, all four stored."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias


def max_pool(x: jax.Array, stride: int = 2, padding: str = "VALID") -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def mean_pool(x: jax.Array) -> jax.Array:
    """3×3 at stride 1; at the borders the mean of the pixels that are there."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class Mixed(nn.Module):
    """Branches of convolutions and one of a pool, joined along the channels.

    branches: each a row of (name, features, kernel[, stride]); a row in a row's place splits the
    branch into convolutions that are joined. pool: what the last branch begins with; it goes on
    with the convolution `branch_pool` of `pool_features`, or with none.
    """

    branches: tuple
    pool: str
    pool_features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x: [B, h, w, C] → all branches joined, and the first one alone."""
        joined = []
        for branch in self.branches:
            y = x
            for layer in branch:
                if isinstance(layer[0], tuple):
                    y = jnp.concatenate([_convolve(each, y) for each in layer], -1)
                else:
                    y = _convolve(layer, y)
            joined.append(y)
        pooled = {
            "mean": mean_pool,
            "max": lambda x: max_pool(x, 1, "SAME"),
            "max, stride 2": max_pool,
        }[self.pool](x)
        if self.pool_features:
            pooled = _convolve(("branch_pool", self.pool_features, (1, 1)), pooled)
        return jnp.concatenate([*joined, pooled], axis=-1), joined[0]


def _convolve(layer: tuple, x: jax.Array) -> jax.Array:
    name, features, kernel, *stride = layer
    padding = "VALID" if stride else "SAME"
    return Convolution(features, kernel, *stride, padding=padding, name=name)(x)


def _a(pool: int) -> dict:
    one, three, five = (1, 1), (3, 3), (5, 5)
    return dict(
        branches=(
            (("branch1x1", 64, one),),
            (("branch5x5_1", 48, one), ("branch5x5_2", 64, five)),
            (("branch3x3dbl_1", 64, one), ("branch3x3dbl_2", 96, three),
             ("branch3x3dbl_3", 96, three)),
        ),
        pool="mean", pool_features=pool,
    )  # fmt: skip


def _c(mid: int) -> dict:
    one, row, column = (1, 1), (1, 7), (7, 1)
    return dict(
        branches=(
            (("branch1x1", 192, one),),
            (("branch7x7_1", mid, one), ("branch7x7_2", mid, row), ("branch7x7_3", 192, column)),
            (("branch7x7dbl_1", mid, one), ("branch7x7dbl_2", mid, column),
             ("branch7x7dbl_3", mid, row), ("branch7x7dbl_4", mid, column),
             ("branch7x7dbl_5", 192, row)),
        ),
        pool="mean", pool_features=192,
    )  # fmt: skip


def _e(pool: str) -> dict:
    one, three, row, column = (1, 1), (3, 3), (1, 3), (3, 1)
    return dict(
        branches=(
            (("branch1x1", 320, one),),
            (("branch3x3_1", 384, one),
             (("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column))),
            (("branch3x3dbl_1", 448, one), ("branch3x3dbl_2", 384, three),
             (("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column))),
        ),
        pool=pool, pool_features=192,
    )  # fmt: skip


_B = dict(
    branches=(
        (("branch3x3", 384, (3, 3), 2),),
        (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)),
         ("branch3x3dbl_3", 96, (3, 3), 2)),
    ),
    pool="max, stride 2",
)  # fmt: skip
_D = dict(
    branches=(
        (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), 2)),
        (("branch7x7x3_1", 192, (1, 1)), ("branch7x7x3_2", 192, (1, 7)),
         ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, (3, 3), 2)),
    ),
    pool="max, stride 2",
)  # fmt: skip
BLOCKS = {
    "5b": _a(32), "5c": _a(64), "5d": _a(64), "6a": _B, "6b": _c(128), "6c": _c(160),
    "6d": _c(160), "6e": _c(192), "7a": _D, "7b": _e("mean"), "7c": _e("max"),
}  # fmt: skip


class Inception(nn.Module):
    """The whole network, in float32."""

    num_classes: int = 1008

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """images: [B, H, W, 3], 0 to 255."""
        x = (resize_bilinear(images.astype(jnp.float32), SIZE) - 128) / 128
        x = Convolution(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Convolution(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = max_pool(Convolution(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Convolution(80, (1, 1), padding="VALID", name="Conv2d_3b_1x1")(x)
        x = max_pool(Convolution(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x))
        for name, parts in BLOCKS.items():
            x, first = Mixed(**parts, name=f"Mixed_{name}")(x)
            if name == "6d":
                spatial = first[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        pool = x.mean((1, 2))
        fc = Weights(self.num_classes, name="fc")(pool)
        return Features(pool, spatial, fc)


class Weights(nn.Module):
    """x·kernel; the stored bias is not added, as in TensorFlow's and ADM's Inception Score."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.dot(x, kernel, precision="highest")
