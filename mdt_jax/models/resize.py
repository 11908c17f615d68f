"""Parameters that depend on the grid of tokens: resampled for another one, or left out if fixed."""

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.mdt import MDT

Grid = tuple[int, int]


def resize_grid(params: dict, old: Grid, new: Grid) -> dict:
    """`params` of a model with the grid `old` (rows, columns) of tokens, for the grid `new`.

    Learned position embeddings are resized bicubically, as images of the grid. A bias table is an
    image of relative offsets. It is interpolated linearly at offsets scaled to the old grid, so
    that offset 0 and the largest offsets keep their values; its three unused rows are kept. Equal
    grids return `params` itself.
    """
    if old == new:
        return params

    def resize(path, array):
        name = path[-1].key
        if name in ("pos_embed", "decoder_pos_embed"):
            return _positions(array, old, new)
        return _table(array, old, new) if name == "relative_bias" else array

    return jax.tree_util.tree_map_with_path(resize, params)


def _positions(array: jax.Array, old: Grid, new: Grid) -> jax.Array:
    """[1, h·w, D] → [1, H·W, D]."""
    dim = array.shape[-1]
    image = jnp.asarray(array).reshape(*old, dim)
    return jax.image.resize(image, (*new, dim), "bicubic", antialias=False).reshape(1, -1, dim)


def _table(array: jax.Array, old: Grid, new: Grid) -> jax.Array:
    """[layers, (2h−1)·(2w−1) + 3, heads] → [layers, (2H−1)·(2W−1) + 3, heads]."""
    layers, _, heads = array.shape
    shape = [2 * side - 1 for side in old]
    table, unused = jnp.split(jnp.asarray(array), [shape[0] * shape[1]], axis=1)
    table = table.reshape(layers, *shape, heads)
    for axis, (before, after) in enumerate(zip(old, new, strict=True), start=1):
        offsets = np.arange(-(after - 1), after) * ((before - 1) / max(after - 1, 1))
        low = np.clip(np.floor(offsets).astype(int), -(before - 1), before - 1)
        high = np.minimum(low + 1, before - 1)
        fraction = (offsets - low).astype(np.float32)
        fraction = fraction.reshape([-1 if a == axis else 1 for a in range(4)])
        below, above = (jnp.take(table, index + before - 1, axis=axis) for index in (low, high))
        table = below * (1 - fraction) + above * fraction
    return jnp.concatenate([table.reshape(layers, -1, heads), unused], axis=1)


def with_fixed_positions(model: MDT, params: dict) -> tuple[MDT, dict]:
    """A DiT without its position embedding, where that is the fixed one, rounded to half precision.

    A file in half precision has it so; it is kept to give the outputs of the published code, but a
    network whose positions are fixed computes it exactly.
    """
    embed = params.get("pos_embed")
    if model.decoder_layers or embed is None:
        return model, params
    fixed = sincos_positions(model.grid, model.hidden_size)[None]
    if not any(np.array_equal(embed, fixed.astype(t)) for t in (np.float16, jnp.bfloat16)):
        return model, params
    rest = {name: leaf for name, leaf in params.items() if name != "pos_embed"}
    return model.clone(learned_position=False), rest
