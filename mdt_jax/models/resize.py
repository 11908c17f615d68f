"""Parameters of a model for another input size: position embeddings and bias tables resampled."""

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]


def resize_grid(params: dict, old: Grid, new: Grid) -> dict:
    """Parameters for a grid of `new` (rows, columns) of tokens, from those for `old`.

    Learned position embeddings are images of `old` and are resized bicubically. A bias table is an
    image of relative offsets; each new offset takes, linearly between its neighbours, the value at
    the offset that is as large a part of the grid, so that offset 0 and the largest ones keep
    theirs. Its three unused rows stay. Nothing changes where the grids are the same.
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
    """[layers, rows, heads], rows (2h−1)·(2w−1) + 3, for the new grid's offsets."""
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
        at = [jnp.take(table, index + before - 1, axis=axis) for index in (low, high)]
        table = at[0] * (1 - fraction) + at[1] * fraction
    return jnp.concatenate([table.reshape(layers, -1, heads), unused], axis=1)
