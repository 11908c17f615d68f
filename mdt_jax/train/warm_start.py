"""Weights that a new run starts from: init.checkpoint."""

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax.diffusion.options import PREDICTS
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.models.resize import resize_grid, with_fixed_positions
from mdt_jax.runtime import files, hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path
from mdt_jax.runtime.hosts import log0
from mdt_jax.weights import picking
from mdt_jax.weights.kinds import Weights, fields_of
from mdt_jax.weights.networks import describe_resize, load_weights
from mdt_jax.weights.step_folders import steps_in
from mdt_jax.weights.vae import norm_of

# Fields of a network that may differ: handled here, or without parameters of their own.
_FREE = ("input_size", "num_classes", "asymmetric", "masked_shortcut")


def read_weights(config: ConfigDict, workdir: Path, model: MDT, key: jax.Array) -> dict | None:
    """{"params", "ema"} of init.checkpoint; None where it is empty, or the run resumes.

    A file holds one set of parameters, which becomes both. Where the number of classes differs the
    label table is initialised from `key`. Where the grid of tokens differs, init.resize must be
    set, and position embeddings and bias tables are resampled. Raises UserError where the networks,
    the diffusion, or the scale of a VAE's latents differ in anything else.
    """
    path = config.init.checkpoint
    if not path or steps_in(workdir):
        return None
    is_file = files.is_file(hub.local_path(picking.resolve(path, "mdt")))
    # What a file does not record is read as the config has it: num_heads of a DiT, decoder_layers
    # of an MDT v1.
    heads = model.num_heads if is_file and not model.decoder_layers else None
    ema = load_weights(path, num_heads=heads)
    unrecorded = is_file and ema.config is None and ema.model.version == "v1"
    unrecorded = unrecorded and ema.model.depth == model.depth
    if unrecorded and 0 < model.decoder_layers != ema.model.decoder_layers:
        ema = load_weights(path, decoder_layers=model.decoder_layers)
    source, params = ema.model, ema.params
    if not is_file:
        params = load_weights(path, params="raw").params
    if not model.learned_position:
        _, params = with_fixed_positions(source, params)
        source, its_ema = with_fixed_positions(source, ema.params)
        ema = ema._replace(model=source, params=its_ema)
    _check_fits(ema, config, model)
    trees, changes = {"params": params, "ema": ema.params}, []
    if source.grid != model.grid:
        trees = resize_grid(trees, source.grid, model.grid)
        changes.append(describe_resize(source, model))
    if source.num_classes != model.num_classes:
        labels = {k: v for k, v in init_params(model, key).items() if k == "label_embed"}
        for name, tree in trees.items():
            trees[name] = {k: v for k, v in tree.items() if k != "label_embed"} | labels
        counts = f"{source.num_classes} classes there, {model.num_classes} here"
        changes.append(f"a new label table: {counts}")
    theirs, wanted = ema.objective, PREDICTS[config.diffusion.objective]
    if theirs != config.diffusion.objective:
        times = " at times from 0 to 1" if theirs == "flow" else ""
        changes.append(f"they predict {PREDICTS[theirs]}{times}, but the run trains for {wanted}")
    for line in [f"parameters and EMA are those of {path}", *changes]:
        log0(f"init.checkpoint: {line}")
    # A step donates its state, so that parameters and EMA must not share memory.
    return trees | {"ema": jax.tree.map(np.array, trees["ema"])}


def _check_fits(weights: Weights[MDT], config: ConfigDict, model: MDT) -> None:
    """Raise UserError where a model cannot start from the weights of another."""
    path, source, theirs = config.init.checkpoint, weights.model, weights.config
    if source.timestep_shift:
        raise UserError(
            f"init.checkpoint {path} is a DiT of diffusers, which embeds timesteps otherwise than "
            "a run does; convert it to a .pt and start from that"
        )
    source_fields = fields_of(source)
    pairs = [(n, source_fields[n], ours) for n, ours in fields_of(model).items() if n not in _FREE]
    if theirs is not None:
        norms = norm_of(theirs)._asdict(), norm_of(config)._asdict()
        pairs += [(f"vae.{name}", old, norms[1][name]) for name, old in norms[0].items()]
        if config.diffusion.objective != "flow":
            pairs.append(("diffusion.steps", theirs.diffusion.steps, config.diffusion.steps))
    different = [f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new]
    if different:
        raise UserError(f"init.checkpoint {path} is of another network: {'; '.join(different)}")
    if source.grid != model.grid and not config.init.resize:
        old, new = (f"{rows}×{columns}" for rows, columns in (source.grid, model.grid))
        raise UserError(
            f"init.checkpoint {path} is for {old} tokens and the config for {new}; "
            "init.resize=True resamples position embeddings and bias tables"
        )
