"""Weights of FID's Inception as ported to PyTorch (pt_inception-2015-12-05): names and layouts.

Heusel et al. 2017 measure with the network of 2015 whose 1,008 logits include eight unused ones.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mdt_jax.models.inception import WHERE, Inception
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.torch_files import check_names, from_torch, to_torch

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_COUNTER = ".num_batches_tracked"  # of newer PyTorch; nothing reads it


def _convolutions() -> Iterator[tuple[str, int, int, int, int]]:
    """(name, input channels, output channels, height, width) of each."""
    yield "Conv2d_1a_3x3", 3, 32, 3, 3
    yield "Conv2d_2a_3x3", 32, 32, 3, 3
    yield "Conv2d_2b_3x3", 32, 64, 3, 3
    yield "Conv2d_3b_1x1", 64, 80, 1, 1
    yield "Conv2d_4a_3x3", 80, 192, 3, 3
    for block, dim, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        yield f"Mixed_{block}.branch1x1", dim, 64, 1, 1
        yield f"Mixed_{block}.branch5x5_1", dim, 48, 1, 1
        yield f"Mixed_{block}.branch5x5_2", 48, 64, 5, 5
        yield f"Mixed_{block}.branch3x3dbl_1", dim, 64, 1, 1
        yield f"Mixed_{block}.branch3x3dbl_2", 64, 96, 3, 3
        yield f"Mixed_{block}.branch3x3dbl_3", 96, 96, 3, 3
        yield f"Mixed_{block}.branch_pool", dim, pool, 1, 1
    yield "Mixed_6a.branch3x3", 288, 384, 3, 3
    yield "Mixed_6a.branch3x3dbl_1", 288, 64, 1, 1
    yield "Mixed_6a.branch3x3dbl_2", 64, 96, 3, 3
    yield "Mixed_6a.branch3x3dbl_3", 96, 96, 3, 3
    for block, mid in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        yield f"Mixed_{block}.branch1x1", 768, 192, 1, 1
        yield f"Mixed_{block}.branch7x7_1", 768, mid, 1, 1
        yield f"Mixed_{block}.branch7x7_2", mid, mid, 1, 7
        yield f"Mixed_{block}.branch7x7_3", mid, 192, 7, 1
        yield f"Mixed_{block}.branch7x7dbl_1", 768, mid, 1, 1
        yield f"Mixed_{block}.branch7x7dbl_2", mid, mid, 7, 1
        yield f"Mixed_{block}.branch7x7dbl_3", mid, mid, 1, 7
        yield f"Mixed_{block}.branch7x7dbl_4", mid, mid, 7, 1
        yield f"Mixed_{block}.branch7x7dbl_5", mid, 192, 1, 7
        yield f"Mixed_{block}.branch_pool", 768, 192, 1, 1
    yield "Mixed_7a.branch3x3_1", 768, 192, 1, 1
    yield "Mixed_7a.branch3x3_2", 192, 320, 3, 3
    yield "Mixed_7a.branch7x7x3_1", 768, 192, 1, 1
    yield "Mixed_7a.branch7x7x3_2", 192, 192, 1, 7
    yield "Mixed_7a.branch7x7x3_3", 192, 192, 7, 1
    yield "Mixed_7a.branch7x7x3_4", 192, 192, 3, 3
    for block, dim in (("7b", 1280), ("7c", 2048)):
        yield f"Mixed_{block}.branch1x1", dim, 320, 1, 1
        yield f"Mixed_{block}.branch3x3_1", dim, 384, 1, 1
        yield f"Mixed_{block}.branch3x3_2a", 384, 384, 1, 3
        yield f"Mixed_{block}.branch3x3_2b", 384, 384, 3, 1
        yield f"Mixed_{block}.branch3x3dbl_1", dim, 448, 1, 1
        yield f"Mixed_{block}.branch3x3dbl_2", 448, 384, 3, 3
        yield f"Mixed_{block}.branch3x3dbl_3a", 384, 384, 1, 3
        yield f"Mixed_{block}.branch3x3dbl_3b", 384, 384, 3, 1
        yield f"Mixed_{block}.branch_pool", dim, 192, 1, 1


def _published_shapes(model: Inception) -> dict[str, tuple[int, ...]]:
    expected = {}
    for name, inputs, outputs, height, width in _convolutions():
        expected[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        expected |= {f"{name}.bn.{kind}": (outputs,) for kind in _NORM}
    classes = model.num_classes
    return {**expected, "fc.weight": (classes, 2048), "fc.bias": (classes,)}


def is_inception(state: Mapping[str, np.ndarray]) -> bool:
    """Whether these look like the names of an Inception."""
    return "Mixed_5b.branch1x1.conv.weight" in state


def _path(name: str) -> str:
    module, _, kind = name.rpartition(".")
    kind = _NORM[kind] if module.endswith("bn") else {"weight": "kernel"}.get(kind, kind)
    return f"{module.replace('.', '/')}/{kind}"


def shapes(model: Inception) -> dict:
    """The arrays of `model` as shapes, float32."""
    flat = {
        _path(name): jax.ShapeDtypeStruct(from_torch(np.broadcast_to(0, shape)).shape, np.float32)
        for name, shape in _published_shapes(model).items()
    }
    return unflatten_dict(flat, sep="/")


def from_published(state: Mapping[str, np.ndarray]) -> tuple[Inception, dict]:
    """(network, float32 arrays) of a state_dict.

    Raises UserError, with the first offending names, where it is not FID's Inception.
    """
    logits = state["fc.bias"].size if "fc.bias" in state else Inception.num_classes
    if logits != Inception.num_classes or any(name.startswith("AuxLogits.") for name in state):
        raise UserError(
            f"this is an Inception of {logits} logits, such as torchvision's Inception v3; FID's "
            f"has {Inception.num_classes} and other features: {WHERE}"
        )
    state = {name: array for name, array in state.items() if not name.endswith(_COUNTER)}
    model = Inception()
    expected = _published_shapes(model)
    check_names(expected, state, "FID's Inception")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(f"{name} has the shape {list(state[name].shape)}, not {list(shape)}")
    flat = {
        _path(name): np.ascontiguousarray(from_torch(array), np.float32)
        for name, array in state.items()
    }
    return model, unflatten_dict(flat, sep="/")


def to_published(model: Inception, params: dict) -> dict[str, np.ndarray]:
    """The state_dict, float32."""
    flat, state = flatten_dict(params, sep="/"), {}
    for name in _published_shapes(model):
        state[name] = np.ascontiguousarray(to_torch(np.asarray(flat[_path(name)])))
    return state
