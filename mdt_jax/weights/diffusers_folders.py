"""Folders that diffusers' DiTPipeline.from_pretrained reads: written from a DiT and its VAE."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from mdt_jax.data.classes import hub_names, imagenet_among
from mdt_jax.diffusion.options import PREDICTS, SampleOptions
from mdt_jax.models.mdt import MDT
from mdt_jax.models.resize import with_fixed_positions
from mdt_jax.runtime import files
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import diffusers_dit, torch_files, vae_names
from mdt_jax.weights.diffusers_dit import INDEX, SCHEDULER, TRANSFORMER, VAE
from mdt_jax.weights.kinds import Weights
from mdt_jax.weights.picking import CONFIG, DIFFUSERS
from mdt_jax.weights.vae import Vae


def save(path: files.Path, weights: Weights, vae: Vae | None) -> list[str]:
    """Write a new folder of a DiTPipeline, whole or not at all.

    vae: what decodes its latents; None leaves it out, so that from_pretrained must be given one.
    Returns what diffusers computes or records otherwise than this package, a line each. Raises
    UserError where diffusers cannot represent the model.
    """
    if not isinstance(weights.model, MDT):
        raise UserError("DiTPipeline is for a DiT; a VAE goes into one with --vae")
    options = SampleOptions(**{"clip_denoised": False, **weights.sampling})
    if weights.config is not None:
        options = SampleOptions.from_config(weights.config)
    if options.objective != "epsilon":
        kind = "a SiT, which" if options.objective == "flow" else "a network that"
        predicts = PREDICTS[options.objective]
        raise UserError(f"diffusers' DiTPipeline has no place for {kind} predicts {predicts}")
    if vae is not None and (vae.norm.shift or vae.norm.std):
        raise UserError(
            "diffusers' DiTPipeline only divides latents by scaling_factor, but those of "
            f"{vae.path} are also shifted, or divided by a deviation"
        )
    model, params = with_fixed_positions(weights.model, weights.params)
    state = diffusers_dit.to_published(model, params)
    scheduler = diffusers_dit.scheduler_of(options)
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        "id2label": {str(number): name for number, name in enumerate(_class_names(weights))},
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
    }
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=".tmp-"))
    except OSError as error:
        raise UserError(f"{path} could not be written: {files.reason(error)}") from None
    try:
        part = temporary / path.name
        _write(part / TRANSFORMER, diffusers_dit.config_of(weights.model), state)
        _write_json(part / SCHEDULER, scheduler)
        if vae is not None:
            index["vae"] = ["diffusers", "AutoencoderKL"]
            config = vae_names.config_of(vae.network, vae.norm)
            _write(part / VAE, config, vae_names.to_published(vae.network, vae.params))
        _write_json(part / INDEX, index)
        os.rename(part, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {files.reason(error)}{files.free(path)}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _differences(weights, vae)


def _class_names(weights: Weights) -> list[str]:
    """The names of classes, ImageNet's in words; [] where they are not known."""
    among = imagenet_among(weights.model.num_classes, weights.classes)
    if among is None:
        return list(weights.classes)
    names = hub_names()
    return [names[label] for label in among]


def _differences(weights: Weights, vae: Vae | None) -> list[str]:
    lines, model = [], weights.model
    if not model.timestep_shift:
        lines.append(
            "diffusers embeds timesteps with frequencies 10000^(−i/127), not 10000^(−i/128) as the "
            "published DiT and this network: its samples differ"
        )
    if model.num_classes != diffusers_dit.NULL_LABEL:
        lines.append(
            f"DiTPipeline takes {diffusers_dit.NULL_LABEL} for the null label, which is "
            f"{model.num_classes} here: draw with guidance_scale=1"
        )
    if vae is None:
        lines.append("the VAE: give it to from_pretrained, or name it by --vae")
    return lines


def _write(folder: pathlib.Path, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    _write_json(folder / CONFIG, config)
    torch_files.write_arrays(folder / f"{DIFFUSERS}.safetensors", state)


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
