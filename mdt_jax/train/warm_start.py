"""Weights that a new run starts from: init.checkpoint."""

import pathlib
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.models.resize import resize_grid
from mdt_jax.runtime import hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import log0
from mdt_jax.weights.networks import Weights, describe_resize, fields_of, load_weights
from mdt_jax.weights.orbax_folders import steps_in

# Fields of a network that may differ: handled here, or without parameters of their own.
_FREE = ("input_size", "num_classes", "asymmetric", "masked_shortcut")


class _Start(NamedTuple):
    """A network, its parameters, their EMA, and the config of its run, if it has one."""

    model: MDT
    params: dict
    ema: dict
    config: ConfigDict | None


def read_weights(
    config: ConfigDict, workdir: pathlib.Path, model: MDT, key: jax.Array
) -> dict | None:
    """{"params", "ema"} of init.checkpoint; None where it is empty, or the run resumes.

    A file holds one set of parameters, which becomes both. Where the number of classes differs the
    label table is initialised from `key`. Where the grid of tokens differs, init.resize must be
    set, and position embeddings and bias tables are resampled. Raises UserError where the networks,
    the diffusion, or the scale of a VAE's latents differ in anything else.
    """
    path = config.init.checkpoint
    if not path or steps_in(workdir):
        return None
    start = _read(path, model)
    _check_fits(start, config, model)
    trees, changes = (start.params, start.ema), []
    if start.model.grid != model.grid:
        trees = tuple(resize_grid(tree, start.model.grid, model.grid) for tree in trees)
        changes.append(describe_resize(start.model, model))
    if start.model.num_classes != model.num_classes:
        labels = {k: v for k, v in init_params(model, key).items() if k == "label_embed"}
        trees = tuple(
            {**{k: v for k, v in tree.items() if k != "label_embed"}, **labels} for tree in trees
        )
        changes.append(
            f"a new label table: {start.model.num_classes} classes there, {model.num_classes} here"
        )
    for line in [f"parameters and EMA are those of {path}", *changes]:
        log0(f"init.checkpoint: {line}")
    params, ema = trees
    # A step donates its state, so that parameters and EMA must not share memory.
    return {"params": params, "ema": jax.tree.map(np.array, ema)}


def _read(path: str, model: MDT) -> _Start:
    """The weights of a checkpoint that `model` is to start from."""
    weights: Weights[MDT] = load_weights(path)
    if not hub.local_path(path).is_file():
        raw = load_weights(path, params="raw").params
        return _Start(weights.model, raw, weights.params, weights.config)
    source = weights.model
    # A v1 file does not record decoder_layers: it is read as the config has it.
    unrecorded = source.version == "v1" and source.depth == model.depth
    if unrecorded and 0 < model.decoder_layers != source.decoder_layers:
        weights = load_weights(path, decoder_layers=model.decoder_layers)
    return _Start(weights.model, weights.params, weights.params, weights.config)


def _check_fits(start: _Start, config: ConfigDict, model: MDT) -> None:
    """Raise UserError where a model cannot start from the weights of another."""
    path, theirs = config.init.checkpoint, fields_of(start.model)
    pairs = [
        (name, theirs[name], ours) for name, ours in fields_of(model).items() if name not in _FREE
    ]
    if start.config is not None:
        pairs += [
            ("vae.scale", start.config.vae.scale, config.vae.scale),
            ("diffusion.steps", start.config.diffusion.steps, config.diffusion.steps),
        ]
    different = [f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new]
    if different:
        raise UserError(f"init.checkpoint {path} is of another network: {'; '.join(different)}")
    if start.model.grid != model.grid and not config.init.resize:
        old, new = (f"{rows}×{columns}" for rows, columns in (start.model.grid, model.grid))
        raise UserError(
            f"init.checkpoint {path} is for {old} tokens and the config for {new}; "
            "init.resize=True resamples position embeddings and bias tables"
        )
