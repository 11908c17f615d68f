"""Weights of FID's Inception as ported to PyTorch (pt_inception-2015-12-05): names and layouts.

Heusel et al. 2017 measure with the network of 2015, whose 1,008 logits include eight unused ones.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.inception import WHERE, Inception
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import state_dicts

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTER = ".num_batches_tracked"  # an unused buffer that newer PyTorch adds


def is_inception(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state_dict has the names of an Inception."""
    return "Mixed_5b.branch1x1.conv.weight" in state


def shapes(model: Inception) -> dict:
    """The parameters of `model` as shapes, float32."""
    images = jnp.zeros((1, 8, 8, 3))
    return jax.eval_shape(lambda: model.init(keys.key(0), images)["params"])


def _name(path: str) -> str:
    """The published name of a parameter."""
    module, _, leaf = path.rpartition("/")
    return f"{module.replace('/', '.')}.{_LEAVES.get(leaf, leaf)}"


def from_published(state: Mapping[str, np.ndarray]) -> tuple[Inception, dict]:
    """(network, float32 parameters) of a state_dict.

    Raises UserError, with the first offending names, where it is not FID's Inception.
    """
    logits = state["fc.bias"].size if "fc.bias" in state else Inception.num_classes
    if logits != Inception.num_classes or any(name.startswith("AuxLogits.") for name in state):
        raise UserError(
            f"this is an Inception of {logits} logits, like torchvision's Inception v3; FID's "
            f"has {Inception.num_classes} and other features: {WHERE}"
        )
    state = {name: array for name, array in state.items() if not name.endswith(_COUNTER)}
    model = Inception()
    return model, state_dicts.to_params(state, shapes(model), _name, "FID's Inception")


def to_published(model: Inception, params: dict) -> dict[str, np.ndarray]:
    """The state_dict, float32."""
    return state_dicts.from_params(params, _name)
