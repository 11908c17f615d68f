"""DINOv2: the vision transformer whose class token FD-DINOv2 compares (arXiv 2304.07193).

Oquab et al. 2023, in the form of facebookresearch/dinov2 without registers: a ViT with LayerScale
and patches of 14×14 pixels, whose position embeddings are resized to the grid of the image.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models import attend

PATCH = 14
SIZE = 224  # FD-DINOv2 resizes images to SIZE × SIZE
WIDTH = 1024  # of ViT-L/14, with which FD-DINOv2 is defined
HEAD = 64  # width of an attention head, in every released size
EPS = 1e-6  # of LayerNorm
# Mean and standard deviation of ImageNet's red, green and blue in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFSET = 0.1  # the released models resize position embeddings by (new side + OFFSET)/(old side)

# Where to get the weights, for messages.
WHERE = (
    "dinov2_vitl14_pretrain.pth at "
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
)


def resize_weights(old: int, new: int) -> np.ndarray:
    """[new, old] float32: how much each old position of a row contributes to each new one.

    Bicubic interpolation of PyTorch's `interpolate` (a = −0.75, without antialiasing, borders
    repeated) with the scale factor (new + OFFSET)/old, so that the last column of the old grid is
    not quite reached.
    """
    scale = (new + OFFSET) / old
    positions = (np.arange(new) + 0.5) / scale - 0.5
    first = np.floor(positions).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        distance = np.abs(positions - (first + tap))
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        np.add.at(
            weights,
            (np.arange(new), np.clip(first + tap, 0, old - 1)),
            np.where(distance <= 1, near, far),
        )
    return weights.astype(np.float32)


class Block(nn.Module):
    """x + LayerScale·attention(norm(x)), then the same with an MLP instead of the attention."""

    mlp_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, N, D]."""
        width = x.shape[-1]

        def scaled(name: str, y: jax.Array) -> jax.Array:
            return y * self.param(name, nn.initializers.ones, (width,))

        h = nn.Dense(3 * width, name="qkv")(nn.LayerNorm(EPS, name="norm1")(x))
        q, k, v = jnp.moveaxis(h.reshape(*h.shape[:2], 3, -1, HEAD), 2, 0)
        h = attend.plain(q, k, v).reshape(x.shape)
        x = x + scaled("ls1", nn.Dense(width, name="proj")(h))
        h = nn.Dense(self.mlp_width, name="fc1")(nn.LayerNorm(EPS, name="norm2")(x))
        h = nn.Dense(width, name="fc2")(nn.gelu(h, approximate=False))
        return x + scaled("ls2", h)


class Dinov2(nn.Module):
    """The whole network, in float32.

    width: D of the tokens, a multiple of HEAD. mlp_width: the hidden units of a block's MLP. grid:
    the rows, and columns, of the position embeddings; 37 in the released models.
    """

    width: int = WIDTH
    depth: int = 24
    mlp_width: int = 4 * WIDTH
    grid: int = 37

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """The class token after the last norm: [B, D].

        images: [B, H, W, 3], values from 0 to 255, of any real type; H and W divisible by PATCH.
        """
        with jax.default_matmul_precision("highest"):
            x = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
            strides = (PATCH, PATCH)
            x = nn.Conv(self.width, strides, strides, "VALID", name="patch_embed")(x)
            tokens = self._tokens(x)
            blocks = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            tokens, _ = blocks(Block(self.mlp_width, name="blocks"), tokens, None)
            return nn.LayerNorm(EPS, name="norm")(tokens[:, 0])

    def _tokens(self, patches: jax.Array) -> jax.Array:
        """[B, h, w, D] → [B, 1 + h·w, D]: the class token and the patches, with positions."""
        zeros, width = nn.initializers.zeros, self.width
        class_token = self.param("cls_token", zeros, (1, 1, width))
        positions = self.param("pos_embed", zeros, (1, 1 + self.grid**2, width))
        self.param("mask_token", zeros, (1, width))  # for training only
        count, *grid, _ = patches.shape
        on_grid = positions[0, 1:].reshape(self.grid, self.grid, width)
        if grid != [self.grid, self.grid]:
            rows, columns = (resize_weights(self.grid, side) for side in grid)
            on_grid = jnp.einsum("hr,wc,rcd->hwd", rows, columns, on_grid)
        tokens = (patches + on_grid).reshape(count, -1, width)
        first = jnp.broadcast_to(class_token + positions[:, :1], (count, 1, width))
        return jnp.concatenate([first, tokens], axis=1)
