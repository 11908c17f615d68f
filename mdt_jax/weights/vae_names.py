"""Weights of Stable Diffusion's VAE in the layouts of diffusers (both namings) and CompVis."""

import pathlib
import re
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import read_json
from mdt_jax.weights import state_dicts

# Patterns of CompVis's names and of diffusers' old ones → diffusers' current names.
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

# What diffusers' config.json may do to latents besides the scaling_factor, and the values that do
# nothing. A model is trained on scaling_factor · (latents − latents_mean − shift_factor) /
# latents_std.
_NEUTRAL = {"shift_factor": 0, "latents_mean": 0, "latents_std": 1}


def read_config(file: pathlib.Path) -> dict:
    """The config.json of diffusers beside a VAE's file; {} where there is none.

    Raises UserError where it cannot be read.
    """
    return read_json(file.with_name("config.json")) or {}


def norm_groups(config: dict) -> int | None:
    """The number of groups in the VAE's norms; None where the config does not have it.

    Raises UserError where it is no positive whole number.
    """
    groups = config.get("norm_num_groups")
    if groups is not None and (type(groups) is not int or groups < 1):
        raise UserError(
            f"norm_num_groups in its config.json is {groups!r}; it must be a whole number from 1"
        )
    return groups


def config_of(model: AutoencoderKL, scale: float) -> dict:
    """The config.json of diffusers' AutoencoderKL."""
    levels = len(model.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(model.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": model.latent_channels,
        "layers_per_block": model.layers,
        "norm_num_groups": model.groups,
        "out_channels": 3,
        "scaling_factor": scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def about_latents(config: dict) -> dict:
    """The fields of a config that describe latents."""
    names = ("scaling_factor", *_NEUTRAL)
    return {name: config[name] for name in names if config.get(name) is not None}


def scaling_factor(latents: dict) -> float | None:
    """The factor of the latents; None where there is none.

    latents: as of `about_latents`. Raises UserError where the factor is no positive number, or the
    latents are shifted or divided as well.
    """
    for name, neutral in _NEUTRAL.items():
        if name in latents and not _equals(latents[name], neutral):
            raise UserError(
                f"{name} is {str(latents[name])[:100]}, but mdt_jax only multiplies latents by one "
                f"number; to ignore it take {name} out of the VAE's config.json"
            )
    factor = latents.get("scaling_factor")
    if factor is None:
        return None
    if type(factor) not in (int, float) or not 0 < factor <= sys.float_info.max:
        raise UserError(f"scaling_factor is {str(factor)[:100]}; it must be a positive number")
    return float(factor)


def _equals(value: object, number: float) -> bool:
    """Whether a number, or all of a list of numbers, equal one."""
    try:
        return bool((np.asarray(value, np.float64) == number).all())
    except (OverflowError, TypeError, ValueError):
        return False


def is_vae(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state_dict has the names of such a VAE."""
    return any(name.endswith("post_quant_conv.weight") for name in state)


def _current_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The VAE's part of a state_dict, by diffusers' current names."""
    inner = "first_stage_model."  # of a whole Stable Diffusion checkpoint
    if any(name.startswith(inner) for name in state):
        state = {n.removeprefix(inner): a for n, a in state.items() if n.startswith(inner)}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    state = {name: array for name, array in state.items() if name.startswith(parts)}
    level = re.compile(r"decoder\.up\.(\d+)\.")
    last = max((int(match[1]) for name in state if (match := level.match(name))), default=0)
    renamed = {}
    for name, array in state.items():
        # CompVis counts the decoder's levels from the image's side.
        name = level.sub(lambda match: f"decoder.up.{last - int(match[1])}.", name)
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".attentions." in name and array.shape[2:] == (1, 1):
            array = array[:, :, 0, 0]  # CompVis has 1×1 convolutions for linear layers
        renamed[name] = array
    return renamed


def _name(path: str) -> str:
    """diffusers' current name of a parameter."""
    module, _, leaf = path.rpartition("/")
    leaf = "bias" if leaf == "bias" else "weight"
    return re.sub(r"_(\d+)(?=/|$)", r".\1", module).replace("/", ".") + f".{leaf}"


def shapes(model: AutoencoderKL) -> dict:
    """The parameters of `model` as shapes."""
    images = jnp.zeros((1, model.factor, model.factor, 3))
    return jax.eval_shape(lambda: model.init(keys.key(0), images)["params"])


def from_published(
    state: Mapping[str, np.ndarray], groups: int | None = None
) -> tuple[AutoencoderKL, dict]:
    """(network, float32 parameters) of a VAE's state_dict; the widths follow from the shapes.

    groups: of the norms, which no state_dict tells; None means 32, as in Stable Diffusion, or fewer
    where the narrowest level has fewer channels. Raises UserError, with the first offending names,
    where it is not such a VAE.
    """
    names = _current_names(state)
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
            f"{model.groups} groups; set norm_num_groups in a config.json beside the file"
        )
    return model, state_dicts.to_params(names or state, shapes(model), _name, "a VAE")


def to_published(model: AutoencoderKL, params: dict) -> dict[str, np.ndarray]:
    """The state_dict by diffusers' current names."""
    return state_dicts.from_params(params, _name)
