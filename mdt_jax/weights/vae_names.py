"""Weights of VAEs in the layouts of diffusers (both namings) and CompVis, and their config.json."""

import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax.config.fields import numbers_of
from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
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
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.(\d+)\.norm\.", r".attentions.\1.group_norm."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.attentions\.(\d+)\.(query|q)\.", r".attentions.\1.to_q."),
    (r"\.attentions\.(\d+)\.(key|k)\.", r".attentions.\1.to_k."),
    (r"\.attentions\.(\d+)\.(value|v)\.", r".attentions.\1.to_v."),
    (r"\.attentions\.(\d+)\.(proj_attn|proj_out)\.", r".attentions.\1.to_out.0."),
]

# The fields of diffusers' config.json that say what a diffusion model is trained on:
# scaling_factor · (latents − latents_mean − shift_factor) / latents_std.
NORM = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


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


def config_of(model: AutoencoderKL, norm: LatentNorm) -> dict:
    """The config.json of diffusers' AutoencoderKL."""

    def blocks(plain: str, attentive: str) -> list[str]:
        return [
            attentive if i in model.attention_levels else plain for i in range(len(model.channels))
        ]

    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(model.channels),
        "down_block_types": blocks("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "in_channels": 3,
        "latent_channels": model.latent_channels,
        "layers_per_block": model.layers,
        "norm_num_groups": model.groups,
        "out_channels": 3,
        "up_block_types": blocks("UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
        "use_post_quant_conv": model.use_quant_conv,
        "use_quant_conv": model.use_quant_conv,
        **config_of_norm(norm),
    }


def config_of_norm(norm: LatentNorm) -> dict:
    """The fields of diffusers' config.json that describe a norm."""
    fields: dict[str, object] = {"scaling_factor": norm.scale}
    if len(norm.shift) == 1:
        fields["shift_factor"] = norm.shift[0]
    elif norm.shift:
        fields["latents_mean"] = list(norm.shift)
    if norm.std:
        fields["latents_std"] = list(norm.std)
    return fields


def norm_of(config: ConfigDict) -> LatentNorm:
    """The norm of latents that the config of a run has."""
    shift, std = (numbers_of(config.vae[name]) for name in ("shift", "std"))
    return LatentNorm(config.vae.scale, shift, std)


def about_latents(config: dict) -> dict:
    """The fields of a config that describe latents."""
    return {name: config[name] for name in NORM if config.get(name) is not None}


def recorded_norm(latents: dict, channels: int | None = None) -> dict[str, Any]:
    """The fields of LatentNorm that a VAE's config.json has, without those that do nothing.

    latents: as of `about_latents`; channels: of the latents, where they are known. Raises UserError
    for a scaling_factor or a latents_std that is not positive, and for lists of another length.
    """
    scale, shift, mean, std = (_numbers(latents, name, channels) for name in NORM)
    found: dict[str, Any] = {}
    if scale is not None:
        found["scale"] = scale[0]
    together = sum(np.array(each) for each in (shift, mean) if each is not None)
    if np.any(together):
        found["shift"] = tuple(np.atleast_1d(together).tolist())
    if std is not None and any(each != 1 for each in std):
        found["std"] = tuple(std)
    return found


def _numbers(latents: dict, name: str, channels: int | None) -> list[float] | None:
    """A field of a VAE's config.json as a list; None where there is none. Raises UserError."""
    if (value := latents.get(name)) is None:
        return None
    many, positive = name.startswith("latents_"), name in ("scaling_factor", "latents_std")
    values = value if many and isinstance(value, list) else [value]
    what = "a positive number" if positive else "a number"
    if many:
        what += f", or {channels or 'several'} in a list, one of each channel of the latents"
    wrong = isinstance(value, list) and channels and len(value) not in (1, channels)
    if wrong or not all(
        type(each) in (int, float)
        and abs(each) <= sys.float_info.max
        and (each > 0 or not positive)
        for each in values
    ):
        raise UserError(f"{name} is {str(value)[:100]}; it must be {what}")
    return [float(each) for each in values]


def is_vae(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state_dict has the names of such a VAE."""
    ends = ("decoder.mid.block_1.conv1.weight", "decoder.mid_block.resnets.0.conv1.weight")
    return any(name.endswith(ends) for name in state)


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
    latents = names.get("decoder.conv_in.weight")
    attention = (rf"encoder.down_blocks.{i}.attentions.0.to_q.weight" for i in range(len(widths)))
    model = AutoencoderKL(
        channels=tuple(widths) or AutoencoderKL.channels,
        layers=sum(bool(re.fullmatch(first, name)) for name in names) or AutoencoderKL.layers,
        latent_channels=AutoencoderKL.latent_channels if latents is None else latents.shape[1],
        groups=min([groups or 32, *widths]),
        use_quant_conv="quant_conv.weight" in names,
        attention_levels=tuple(i for i, name in enumerate(attention) if name in names),
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
