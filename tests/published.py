"""The recorded numbers of the published code in tests/golden, in this project's layout (NHWC)."""

import pathlib

import jax
import numpy as np

from mdt_jax.interop.mdt_weights import params_from_published
from mdt_jax.models.mdt import MDT

GOLDEN = pathlib.Path(__file__).parent / "golden"

V1_MODEL = MDT(
    input_size=(16, 16), in_channels=4, hidden_size=32, depth=4, num_heads=2, num_classes=10
)


def v1_params(name: str = "v1_state") -> dict:
    return params_from_published(dict(np.load(GOLDEN / f"{name}.npz")), decoder_layers=2)


def v1_numbers() -> dict[str, np.ndarray]:
    """Arrays of v1.npz; those with a channel axis moved last, integers as int32."""
    numbers = {}
    for name, array in np.load(GOLDEN / "v1.npz").items():
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
