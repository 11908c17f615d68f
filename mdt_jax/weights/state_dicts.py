"""PyTorch's state_dicts and Flax's trees of parameters: names and layouts of arrays."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mdt_jax.runtime.errors import UserError

# Axes by their number: [out, in, h, w] ⇄ [h, w, in, out] and [out, in] ⇄ [in, out].
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}


def from_torch(array: np.ndarray) -> np.ndarray:
    """A convolution's or linear layer's weight, or a vector, in Flax's layout."""
    return array.transpose(_FROM_TORCH.get(array.ndim))


def to_torch(array: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`."""
    return array.transpose(_TO_TORCH.get(array.ndim))


def flat(tree: Mapping) -> dict[str, Any]:
    """The leaves of a tree by path, for example "encoder/conv_in/kernel"."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))


def check(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple], network: str) -> None:
    """Raise UserError where names or shapes differ, with the first offending names.

    shapes: by name, as they should be. network: what messages call it.
    """
    problems = []
    for problem, names in (
        ("missing", [name for name in shapes if name not in state]),
        ("unexpected", [name for name in state if name not in shapes]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            first = ", ".join(name[:80] for name in names[:3])
            problems.append(f"{problem} {' '.join(first.split())}{more}")
    if problems:
        raise UserError(f"these are not the weights of {network}: {'; '.join(problems)}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise UserError(f"{name} has the shape {list(state[name].shape)}, not {list(shape)}")


def to_params(
    state: Mapping[str, np.ndarray], shapes: Mapping, name_of: Callable[[str], str], network: str
) -> dict:
    """The float32 parameters that a state_dict holds.

    shapes: the tree of the parameters' shapes. name_of: path → name. network: what messages call
    it. Raises UserError, with the first offending names, where the arrays are not the network's.
    """
    expected = {}
    for path, leaf in flat(shapes).items():
        expected[name_of(path)] = to_torch(np.broadcast_to(np.float32(0), leaf.shape)).shape
    check(state, expected, network)
    params = {
        path: np.ascontiguousarray(from_torch(state[name_of(path)]), np.float32)
        for path in flat(shapes)
    }
    return unflatten_dict(params, sep="/")


def from_params(params: Mapping, name_of: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The inverse of `to_params`."""
    return {
        name_of(path): np.ascontiguousarray(to_torch(np.asarray(array)))
        for path, array in flat(params).items()
    }
