"""Weights of Stable Diffusion's VAE, in diffusers' layout (both namings) or CompVis's, as ours."""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular, reason
from mdt_jax.weights.torch_files import check_names, from_torch, to_torch

# CompVis's names, part by part, and diffusers' old ones → diffusers' of today.
_RENAMED = [
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.attentions\.0\.(query|q)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(key|k)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(value|v)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(proj_attn|proj_out)\.", ".attentions.0.to_out.0."),
]


# What diffusers' config.json says of latents, and what leaves them as they are. In full a model is
# trained on scaling_factor · (latents − latents_mean − shift_factor) / latents_std.
LATENTS = {"scaling_factor": None, "shift_factor": 0, "latents_mean": 0, "latents_std": 1}


def read_config(file: pathlib.Path) -> dict:
    """diffusers' config.json beside a VAE's file; {} where there is none.

    Raises UserError where it cannot be read.
    """
    path = file.with_name("config.json")
    try:
        check_regular(path)
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no config of a VAE: it must be a JSON object")
    return config


def norm_groups(config: dict) -> int | None:
    """Of a `read_config`, if it says so. Raises UserError."""
    groups = config.get("norm_num_groups")
    if groups is not None and (type(groups) is not int or groups < 1):
        raise UserError(f"norm_num_groups in its config.json is {groups!r}; a whole number from 1")
    return groups


def about_latents(config: dict) -> dict:
    """The fields of a `read_config` that say what is done to latents; empty where nothing is."""
    return {name: config[name] for name in LATENTS if config.get(name) is not None}


def scaling_factor(latents: dict) -> float | None:
    """What latents are multiplied by, as `about_latents` has it; None where it does not say.

    Raises UserError where it is no positive number, or latents are shifted or divided, too.
    """
    for name, value in latents.items():
        try:
            values = np.asarray(value, np.float64)
        except (OverflowError, TypeError, ValueError):
            raise UserError(f"{name} is {str(value)[:100]}, which is no number") from None
        neutral = LATENTS[name]
        if neutral is not None and (values != neutral).any():
            raise UserError(
                f"{name} is {str(value)[:100]}, but here latents are multiplied by one number and "
                f"not changed otherwise; to do without it take {name} out of the VAE's config.json"
            )
    factor = latents.get("scaling_factor")
    if factor is None:
        return None
    if isinstance(factor, (bool, str, list)) or not 0 < factor < math.inf:
        raise UserError(f"scaling_factor is {str(factor)[:100]}; it must be a positive number")
    return float(factor)


def is_vae(state: Mapping[str, np.ndarray]) -> bool:
    """Whether these look like the names of such a VAE."""
    return any(name.endswith("post_quant_conv.weight") for name in state)


def _todays_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The VAE's part of a state_dict by diffusers' names of today."""
    inner = "first_stage_model."  # of a whole Stable Diffusion checkpoint
    if any(name.startswith(inner) for name in state):
        state = {n.removeprefix(inner): a for n, a in state.items() if n.startswith(inner)}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    state = {name: array for name, array in state.items() if name.startswith(parts)}
    levels = 1 + max(
        (int(m[1]) for name in state if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=-1
    )
    renamed = {}
    for name, array in state.items():
        if levels:  # CompVis counts the decoder's levels from the image's side
            name = re.sub(
                r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name
            )
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    return renamed


def _name(path: str) -> str:
    """diffusers' name of today of an array of ours."""
    module, _, kind = path.rpartition("/")
    kind = "bias" if kind == "bias" else "weight"
    return re.sub(r"_(\d+)(?=/|$)", r".\1", module).replace("/", ".") + f".{kind}"


def shapes(model: AutoencoderKL) -> dict:
    """The parameters of `model` as shapes."""
    images = jnp.zeros((1, model.factor, model.factor, 3))
    return jax.eval_shape(lambda: model.init(keys.key(0), images)["params"])


def from_published(
    state: Mapping[str, np.ndarray], groups: int | None = None
) -> tuple[AutoencoderKL, dict]:
    """(network, float32 parameters) of a VAE's state_dict, its widths read from the shapes.

    groups: of the norms, which no file tells; None means 32, as in Stable Diffusion, or fewer
    where the narrowest level has fewer channels. Raises UserError, with the first offending names,
    where it is not such a VAE.
    """
    names = _todays_names(state)
    for name, array in names.items():
        if not array.size or not array.ndim:
            raise UserError(f"{name} has the shape {list(array.shape)}, which is no VAE's")
    widths = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in names:
        widths.append(len(names[name]))
    first = r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight"
    latents = names.get("post_quant_conv.weight")
    model = AutoencoderKL(
        channels=tuple(widths) or AutoencoderKL.channels,
        layers=sum(bool(re.fullmatch(first, name)) for name in names) or AutoencoderKL.layers,
        latent_channels=AutoencoderKL.latent_channels if latents is None else len(latents),
        groups=min([groups or 32, *widths]),
    )
    if model.groups < 1 or any(width % model.groups for width in widths):
        raise UserError(
            f"the VAE's levels of {', '.join(map(str, widths))} channels cannot be normed in "
            f"{model.groups} groups; norm_num_groups in a config.json beside the file says how many"
        )
    flat = cast(dict[str, Any], flatten_dict(shapes(model), sep="/"))
    expected = {
        _name(path): (path, to_torch(np.broadcast_to(np.float32(0), leaf.shape)).shape)
        for path, leaf in flat.items()
    }
    check_names(expected, names or state, "a VAE")
    params = {}
    for name, (path, shape) in expected.items():
        array = names[name]
        if ".attentions." in name and array.ndim == 4:  # CompVis has convolutions of 1×1 there
            array = array[:, :, 0, 0]
        if array.shape != shape:
            raise UserError(f"{name} has the shape {list(array.shape)}, not {list(shape)}")
        params[path] = np.ascontiguousarray(from_torch(array), np.float32)
    return model, unflatten_dict(params, sep="/")


def to_published(model: AutoencoderKL, params: dict) -> dict[str, np.ndarray]:
    """The state_dict by diffusers' names of today."""
    flat = flatten_dict(params, sep="/")
    return {_name(path): np.ascontiguousarray(to_torch(np.asarray(a))) for path, a in flat.items()}
