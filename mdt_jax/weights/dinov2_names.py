"""Weights of DINOv2 as facebookresearch/dinov2 and Hugging Face publish them: names and layouts."""

import math
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mdt_jax.models.dinov2 import HEAD, PATCH, Dinov2
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import state_dicts

# Modules of a block: ours → the published name.
_MODULES = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_LEAVES = {"kernel": "weight", "scale": "weight"}
# Patterns of Hugging Face's names → the published names.
_RENAMED = [
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]
# What only other networks of the family have → what those are.
_OTHERS = {
    "register_tokens": "with registers",
    "blocks.0.mlp.w12.weight": "of size g with SwiGLU",
    "blocks.0.mlp.weights_in.weight": "of size g with SwiGLU",
}


def is_dinov2(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state_dict has the names of a DINOv2."""
    return "blocks.0.ls1.gamma" in state or "encoder.layer.0.layer_scale1.lambda1" in state


def shapes(model: Dinov2) -> dict:
    """The parameters of `model` as shapes, float32."""
    images = jnp.zeros((1, PATCH, PATCH, 3))
    return jax.eval_shape(lambda: model.init(keys.key(0), images)["params"])


def _published(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state_dict of either kind with the published names."""
    renamed = {}
    for name, array in state.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            qkv = np.concatenate([renamed.pop(part) for part in parts])
            renamed[name.replace(".query.", ".qkv.")] = qkv
    return renamed


def _pairs(model: Dinov2) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(published name, path of our array, index in it) of every parameter."""
    for path in state_dicts.flat(shapes(model)):
        module, _, leaf = path.rpartition("/")
        leaf = _LEAVES.get(leaf, leaf)
        if module == "patch_embed":
            yield f"patch_embed.proj.{leaf}", path, ()
        elif not module.startswith("blocks"):
            yield f"{module}.{leaf}".lstrip("."), path, ()
        else:
            module = module.removeprefix("blocks").lstrip("/")
            name = f"{_MODULES.get(module, module)}.{leaf}" if module else f"{leaf}.gamma"
            for layer in range(model.depth):
                yield f"blocks.{layer}.{name}", path, (layer,)


def _model_of(state: Mapping[str, np.ndarray]) -> Dinov2:
    """The network that a state_dict with the published names is of. Raises UserError."""
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    sizes = {"pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    if any(name not in state for name in sizes):
        _check(state, Dinov2(depth=max(depth, 1)))
    for name, axes in sizes.items():
        if state[name].ndim != axes or 0 in state[name].shape:
            raise UserError(f"{name} has the shape {list(state[name].shape)}, which is no DINOv2's")
    _, positions, width = state["pos_embed"].shape
    if width % HEAD:
        raise UserError(f"a width of {width} is no DINOv2's: its heads have {HEAD} channels each")
    mlp_width = len(state["blocks.0.mlp.fc1.weight"])
    return Dinov2(width, depth, mlp_width, math.isqrt(positions - 1))


def _check(state: Mapping[str, np.ndarray], model: Dinov2) -> None:
    leaves = state_dicts.flat(shapes(model))
    expected = {}
    for name, path, index in _pairs(model):
        array = np.broadcast_to(np.float32(0), leaves[path].shape)[index]
        expected[name] = (state_dicts.to_torch(array) if path.endswith("kernel") else array).shape
    state_dicts.check(state, expected, "a DINOv2")


def from_published(state: Mapping[str, np.ndarray]) -> tuple[Dinov2, dict]:
    """(network, float32 parameters) of a state_dict.

    Raises UserError, with the first offending names, where it is not a DINOv2 of size S, B or L
    without registers.
    """
    state = _published(state)
    for name, kind in _OTHERS.items():
        if name in state:
            raise UserError(f"this is a DINOv2 {kind}; only sizes S, B and L without registers fit")
    model = _model_of(state)
    _check(state, model)
    leaves = {
        path: np.empty(leaf.shape, np.float32)
        for path, leaf in state_dicts.flat(shapes(model)).items()
    }
    for name, path, index in _pairs(model):
        array = state[name]
        leaves[path][index] = state_dicts.from_torch(array) if path.endswith("kernel") else array
    return model, unflatten_dict(leaves, sep="/")


def to_published(model: Dinov2, params: dict) -> dict[str, np.ndarray]:
    """The state_dict with the names of facebookresearch/dinov2, float32."""
    leaves, state = state_dicts.flat(params), {}
    for name, path, index in _pairs(model):
        array = np.asarray(leaves[path])[index]
        state[name] = np.ascontiguousarray(
            state_dicts.to_torch(array) if path.endswith("kernel") else array
        )
    return state
