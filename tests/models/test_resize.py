import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.models.resize import resize_grid
from tests.models.common import apply, random_params

SMALL = dict(in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=3)


def table(params, grid, layer=0):
    """A bias table as an image of offsets, [2h−1, 2w−1, heads]."""
    rows = np.asarray(params["encoder"]["attention"]["relative_bias"][layer])[:-3]
    return rows.reshape(2 * grid[0] - 1, 2 * grid[1] - 1, -1)


@pytest.mark.parametrize("new", [(8, 8), (4, 8), (2, 2), (5, 3)])
def test_shapes_are_those_of_the_new_model(new):
    old = MDT(input_size=(8, 8), **SMALL)
    other = old.clone(input_size=(2 * new[0], 2 * new[1]))
    params = resize_grid(random_params(old), (4, 4), new)
    shapes = jax.eval_shape(functools.partial(init_params, other), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    x = jnp.ones((1, *other.input_size, 1))
    out = apply(other, params, x, jnp.array([3]), jnp.array([0]))
    assert np.all(np.isfinite(out))


def test_the_same_grid_changes_nothing():
    params = random_params(MDT(input_size=(8, 8), **SMALL))
    assert resize_grid(params, (4, 4), (4, 4)) is params


def test_offset_zero_and_the_largest_offsets_keep_their_bias():
    params = random_params(MDT(input_size=(8, 8), **SMALL))
    before = table(params, (4, 4))
    after = table(resize_grid(params, (4, 4), (8, 6)), (8, 6))
    np.testing.assert_allclose(after[7, 5], before[3, 3], rtol=1e-6)
    np.testing.assert_allclose(after[[0, 0, -1, -1], [0, -1, 0, -1]],
                               before[[0, 0, -1, -1], [0, -1, 0, -1]], rtol=1e-6)  # fmt: skip


def test_a_bias_that_is_linear_in_the_offset_stays_so():
    params = random_params(MDT(input_size=(8, 8), **SMALL))
    y, x = np.meshgrid(np.linspace(-1, 1, 7), np.linspace(-1, 1, 7), indexing="ij")
    rows = np.concatenate([(2 * y + 3 * x).reshape(-1), np.zeros(3)]).astype(np.float32)
    bias = params["encoder"]["attention"]["relative_bias"]
    params["encoder"]["attention"]["relative_bias"] = jnp.broadcast_to(rows[:, None], bias.shape)
    after = table(resize_grid(params, (4, 4), (6, 9)), (6, 9))[..., 0]
    y, x = np.meshgrid(np.linspace(-1, 1, 11), np.linspace(-1, 1, 17), indexing="ij")
    np.testing.assert_allclose(after, 2 * y + 3 * x, atol=1e-6)


def test_positions_of_a_smooth_image_stay_smooth():
    model = MDT(input_size=(32, 32), **SMALL)
    params = init_params(model, jax.random.key(0))
    resized = resize_grid(params, (16, 16), (32, 32))["pos_embed"].reshape(32, 32, 16)
    original = params["pos_embed"].reshape(16, 16, 16)
    # Each old token lies between two of the new ones.
    between = (
        resized[::2, ::2] + resized[1::2, ::2] + resized[::2, 1::2] + resized[1::2, 1::2]
    ) / 4
    assert np.abs(between - original)[2:-2, 2:-2].max() < 0.05
