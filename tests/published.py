"""The recorded numbers of the published code in tests/golden, in this project's layout (NHWC)."""

import functools
import pathlib

import jax
import numpy as np

from mdt_jax.models.inception import Inception
from mdt_jax.models.mdt import MDT
from mdt_jax.weights import inception_names
from mdt_jax.weights.mdt_names import params_from_published

GOLDEN = pathlib.Path(__file__).parent / "golden"

_SHAPE = dict(input_size=(16, 16), in_channels=4, hidden_size=32, num_heads=2, num_classes=10)
MODELS = {
    "v1": MDT(**_SHAPE, depth=4),
    "v2": MDT(**_SHAPE, depth=6, version="v2"),
}
VERSIONS = tuple(MODELS)


def published_state(name: str) -> dict[str, np.ndarray]:
    """NAME.npz: arrays by published name."""
    return dict(np.load(GOLDEN / f"{name}.npz"))


def published_params(name: str) -> dict:
    """The parameters in NAME.npz, such as v1_state or v2_ema_after."""
    return params_from_published(published_state(name), MODELS[name.partition("_")[0]])


def zeros_like_published() -> dict[str, np.ndarray]:
    """The state_dict of FID's Inception, all zero."""
    model = Inception()
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), inception_names.shapes(model)
    )
    return inception_names.to_published(model, zeros)


@functools.cache
def published_numbers(version: str) -> dict[str, np.ndarray]:
    """Arrays of v1.npz or v2.npz; a channel axis moved last, integers as int32."""
    numbers = {}
    for name, array in np.load(GOLDEN / f"{version}.npz").items():
        if array.ndim >= 4:
            array = np.moveaxis(array, -3, -1)
        elif array.dtype == np.int64:
            array = array.astype(np.int32)
        numbers[name] = array
    return numbers


def relative_error(got, expected) -> float:
    """‖got − expected‖/‖expected‖ over all arrays together, in float64."""
    got, expected = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (got, expected)
    )
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
