"""Networks with their parameters: read from runs, folders and files of any kind, and saved."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
from mdt_jax.models.layers import EPS
from mdt_jax.models.mdt import MDT
from mdt_jax.models.resize import resize_grid
from mdt_jax.runtime import files, hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log
from mdt_jax.weights import (
    mdt_names,
    orbax_folders,
    picking,
    published_files,
    torch_files,
    vae_names,
)
from mdt_jax.weights.kinds import (
    ITEMS,
    KINDS,
    Weights,
    kind_of,
    meta_of,
    network_of,
    of_meta,
    shapes_of,
)

_STEP_ITEMS = {"ema": "ema", "raw": "params"}  # what a step's folder calls them
_ONLY = "weights"  # what a folder of `save` calls its parameters, whichever they are


def load_weights(
    path: str | os.PathLike,
    params: str = "ema",
    decoder_layers: int | None = None,
    input_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Weights[MDT]:
    """An MDT's or DiT's weights, and the config of the run they come from, if any.

    path: a workdir, its checkpoints folder, one step of it, a folder that `convert` wrote, a
    published file (.pt, .pth, .bin, .ckpt, .safetensors, .safetensors.index.json), a folder with
    one, or hf://OWNER/REPOSITORY[@REVISION][/FILE]; `picking.pick` has the rule for the file.
    params: "ema", or "raw" for the parameters that the optimiser updates; most files have only one
    kind.
    decoder_layers: of a published file of MDT v1, which does not record it (None: 2).
    num_heads: of a published file of DiT or SiT, which does not record it (None: as released).
    input_size: (H, W) of the latents (or pixels) that the model shall take. Where the weights are
    for another size, position embeddings and bias tables are resampled, with a line on stderr.
    Raises UserError where there are no weights, or they are damaged or another network's.
    """
    weights = read_network(path, params, decoder_layers, num_heads, "mdt")
    old = weights.model
    if input_size is None or tuple(input_size) == old.input_size:
        return weights
    patch, (height, width) = old.patch_size, input_size
    if min(height, width) < patch or height % patch or width % patch:
        raise UserError(
            f"input_size is {height}×{width}; {path} requires positive multiples of {patch}"
        )
    new = old.clone(input_size=(height, width))
    log(f"{path}: {describe_resize(old, new)}")
    return weights._replace(model=new, params=resize_grid(weights.params, old.grid, new.grid))


def describe_resize(old: MDT, new: MDT) -> str:
    """What happens to the arrays that depend on the grid of tokens, in a line."""
    sizes = (f"{rows}×{columns}" for rows, columns in (old.grid, new.grid))
    learned = new.learned_position or new.relative_bias
    what = (
        "position embeddings and bias tables resampled" if learned else "positions computed anew,"
    )
    return f"{what} from {{}} to {{}} tokens".format(*sizes)


def read_network(
    path: str | os.PathLike,
    params: str = "ema",
    decoder_layers: int | None = None,
    num_heads: int | None = None,
    kind: str | None = None,
) -> Weights[Any]:
    """Any network's weights; arguments as of `load_weights`.

    kind: the key in KINDS that the network must have. Raises UserError.
    """
    if params not in ITEMS:
        raise UserError(f"params is {params!r}; choose one of {', '.join(ITEMS)}")
    if not str(path):
        raise UserError("checkpoint '' does not exist")
    source = picking.resolve(str(path), kind)
    local = hub.local_path(source)
    told = {"decoder_layers": decoder_layers, "num_heads": num_heads}
    # A file of any other suffix, too, for a message that says what it is.
    is_file = torch_files.is_weights(local.name) or os.path.isfile(local)
    if files.is_dir(local) or not is_file:
        for name, value in told.items():
            if value is not None:
                raise UserError(f"{name} is for published files; {path} records its own")
        weights = _read_folder(local, params)
    else:
        weights = published_files.read(pathlib.Path(local), str(path), source, params, told, kind)
    for place, leaf in jax.tree_util.tree_leaves_with_path(weights.params):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise UserError(f"{path}: {name} is not finite everywhere: the weights are damaged")
    if kind is not None and not isinstance(weights.model, KINDS[kind].model):
        held = KINDS[kind_of(weights.model)].name
        raise UserError(f"{path} holds {held}, not {KINDS[kind].name}")
    return weights


def _read_folder(path: files.Path, params: str) -> Weights[Any]:
    """From a workdir, its checkpoints folder, one step of it, or a folder of `save`."""

    def choose(meta: dict) -> tuple[str, dict]:
        item = _ONLY if _ONLY in meta["checksums"] else _STEP_ITEMS[params]
        return item, shapes_of(network_of(meta))

    arrays, meta = orbax_folders.load_item(path, choose)
    return of_meta(meta, arrays, meta["item"] if _ONLY in meta["checksums"] else params)


def save(path: str | os.PathLike, weights: Weights) -> None:
    """Write parameters, whole or not at all: a published file where the suffix is one of
    `torch_files.SUFFIXES`, else an Orbax folder.

    A folder keeps the config of the run, if it is of this model. Raises UserError where the
    published code cannot represent the model, and where the disk is full.
    """
    path, kind, model = files.as_path(path), kind_of(weights.model), weights.model
    if path.suffix in torch_files.SUFFIXES:
        state = KINDS[kind].names.to_published(model, weights.params)
        torch_files.write_arrays(path, state, weights.classes)
        return
    orbax_folders.save_folder(path, _ONLY, weights.params, meta_of(weights))


def unrecorded(weights: Weights) -> list[str]:
    """What a published file of a network cannot record, a line each."""
    lines, model = _unrecorded_latents(weights.config), weights.model
    if isinstance(model, MDT):
        if not model.decoder_layers:
            return lines + _unrecorded_of_dit(weights)
        if weights.objective != "epsilon":
            lines.append(f"it must be sampled with objective={weights.objective}")
        if model.version == "v1" and model.decoder_layers != mdt_names.DECODER_LAYERS:
            lines.append(f"it must be read with decoder_layers={model.decoder_layers}")
        for field in ("masked_shortcut", "asymmetric"):
            if not getattr(model, field):
                lines.append(f"{field} was False, which changes only the masked pass")
    elif isinstance(model, AutoencoderKL):
        config: dict[str, object] = dict(weights.latents or {})
        if model.groups != min(32, *model.channels):
            config["norm_num_groups"] = model.groups
        if config:
            lines.append(f"it needs, beside it, a config.json of {json.dumps(config)}")
    return lines


def _unrecorded_latents(config: ConfigDict | None) -> list[str]:
    """What a file of a run does not record of its latents, where it is not Stable Diffusion's."""
    if config is None or config.vae.path == "identity":
        return []
    norm = vae_names.norm_of(config)
    if norm == LatentNorm() and config.vae.channels == AutoencoderKL.latent_channels:
        return []
    fields = json.dumps(vae_names.config_of_norm(norm))
    return [
        f"it draws latents of {config.vae.path}: give it by --vae, with a config.json of {fields} "
        "beside it"
    ]


def _unrecorded_of_dit(weights: Weights[MDT]) -> list[str]:
    lines, model = [], weights.model
    if model.num_heads != mdt_names.heads_of(model.hidden_size):
        lines.append(f"it must be read with num_heads={model.num_heads}")
    if model.timestep_shift or model.mlp_norm_eps != EPS:
        lines.append("it was a DiT of diffusers, which the published code computes otherwise")
    if weights.objective == "flow":
        lines.append("it must be sampled with objective=flow, unless SiT is in the file's name")
    if weights.objective == "v":
        lines.append("it must be sampled with objective=v")
    return lines
