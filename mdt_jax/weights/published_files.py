"""Published files of any kind as networks with their parameters."""

import pathlib
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.options import UNGUIDED
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import files, hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import read_json, reason
from mdt_jax.runtime.progress import log
from mdt_jax.weights import (
    config_files,
    diffusers_dit,
    dinov2_names,
    foreign,
    inception_names,
    mdt_names,
    picking,
    torch_files,
    vae_names,
)
from mdt_jax.weights.kinds import (
    KINDS,
    Network,
    Weights,
    fields_of,
    kind_of,
    network_of,
    of_meta,
    params_sha256,
)

# How the published sample.py of DiT draws; SiT's has an adaptive solver that mdt_jax lacks.
DIT_SAMPLING = {"guidance": "constant", "guidance_scale": 4.0}
SIT_SAMPLING = DIT_SAMPLING | {"objective": "flow", "sampler": "euler"}


def read(
    file: pathlib.Path,
    path: str,
    source: str,
    params: str,
    told: dict[str, int | None],
    kind: str | None,
) -> Weights[Any]:
    """From a published file.

    path: as the user gave it, for messages. source: where the file is, for those beside it. told:
    what such a file may not record.
    """
    folder = source[: source.rfind("/") + 1]
    try:
        held = torch_files.read_file(
            file, lambda shard: hub.local_path(folder + shard), raw=params == "raw"
        )
        if held.part:
            left = ", ".join(name[:80] for name in held.others)
            unused = f"; not used: {left}" if left else ""
            log(f"{path}: the weights are those under '{held.part}'{unused}")
        meta = config_files.read(file)
        if meta is not None:
            weights = _as_uploaded(held.arrays, meta, told)
        else:
            weights = _of_known_kind(held, file, told, kind)
        if diffusers_dit.is_transformer(held.arrays):
            weights = _in_pipeline(weights, folder)
        weights = weights._replace(stored=held.dtype, item=held.item or weights.item)
        del held
        _copy(weights.params)
        classes = () if weights.classes else torch_files.read_classes(file)
        if isinstance(weights.model, MDT) and len(classes) == weights.model.num_classes:
            weights = weights._replace(classes=classes)
        return weights
    except UserError as error:
        # A copy of an object is not where the user would look.
        text = str(error).replace(str(file), path) if files.in_bucket(path) else str(error)
        name = "" if text.startswith((str(file), path)) else f"{path}: "
        raise UserError(f"{name}{text}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Unexpected shapes in a file with the right names.
        raise UserError(f"{path}: its arrays do not fit together: {reason(error)}") from None


def _copy(params: dict) -> None:
    """Copy arrays to the device in place, one at a time, so that one copy in all is in memory.

    The mapped file that they may be in is closed then, and saving needs no further copy.
    """
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            _copy(leaf)
        else:
            params[name] = jnp.asarray(leaf)


def _of_known_kind(
    held: torch_files.File, file: pathlib.Path, told: dict[str, int | None], kind: str | None
) -> Weights[Any]:
    """`_from_state_dict`, whose error says what the arrays are where they are another program's."""
    try:
        return _from_state_dict(held, file, told, kind)
    except (UserError, ArithmeticError, LookupError, TypeError):
        if what := foreign.from_arrays(held.arrays):
            raise UserError(f"{file} is {what}") from None
        raise


def _from_state_dict(
    held: torch_files.File, file: pathlib.Path, told: dict[str, int | None], kind: str | None
) -> Weights[Any]:
    """The names tell the kind of network; where they do not, it is read as the required kind."""
    state = held.arrays
    if vae_names.is_vae(state) or kind == "vae":
        config = vae_names.read_config(file)
        model, params = vae_names.from_published(state, vae_names.norm_groups(config))
        weights = Weights(model, params, latents=vae_names.about_latents(config))
    elif dinov2_names.is_dinov2(state) or (
        kind == "dinov2" and "x_embedder.proj.weight" not in state
    ):
        weights = Weights(*dinov2_names.from_published(state))
    elif inception_names.is_inception(state) or (kind == "inception" and "pos_embed" not in state):
        weights = Weights(*inception_names.from_published(state))
    elif diffusers_dit.is_transformer(state):
        config = read_json(file.with_name(picking.CONFIG))
        weights = Weights(*diffusers_dit.from_published(state, config))
    else:
        weights = Weights(*mdt_names.from_published(state, **told))
        if mdt_names.is_dit(state):
            unguided = {} if weights.model.num_classes else UNGUIDED
            weights = weights._replace(sampling=_sampling_of_dit(held, file) | unguided)
        return weights
    _check_told(weights.model, told)
    return weights


def _sampling_of_dit(held: torch_files.File, file: pathlib.Path) -> dict[str, Any]:
    """How a DiT or SiT is sampled, which its file's name and its training's flags alone tell."""
    args = held.args or {}
    if "SiT" not in file.name and "SiT" not in str(args.get("model")) and "path_type" not in args:
        return DIT_SAMPLING
    for name, sampled in (("path_type", "Linear"), ("prediction", "velocity")):
        if args.get(name, sampled) != sampled:
            log(f"{file}: its {name} is {args[name]}, but only a SiT of {sampled} can be sampled")
    return SIT_SAMPLING


def _check_told(model: Network, told: dict[str, int | None]) -> None:
    """Raise UserError where the user said otherwise what a file records."""
    for field, value in told.items():
        if value is not None and not hasattr(model, field):
            name = KINDS[kind_of(model)].name
            raise UserError(f"{field} is for an MDT or DiT; this is {name}")
        if value is not None and getattr(model, field) != value:
            raise UserError(f"{field} is {value}, but the file has {getattr(model, field)}")


def _in_pipeline(weights: Weights[MDT], folder: str) -> Weights[MDT]:
    """A DiT of diffusers with what its DiTPipeline, if it is in one, says of it.

    folder: of its file; that of a pipeline's transformer has the others beside it.
    """
    pipeline, _, name = folder.rstrip("/").rpartition("/")
    found = {}
    for part in (diffusers_dit.INDEX, diffusers_dit.SCHEDULER):
        is_part = name == diffusers_dit.TRANSFORMER
        file = hub.optional_path(f"{pipeline or '.'}/{part}") if is_part else None
        found[part] = None if file is None else read_json(file)
    sampling, lacks = diffusers_dit.sampling_of(found[diffusers_dit.SCHEDULER])
    for line in lacks:
        log(f"{folder}: its scheduler's {line} is left out: samples differ from those of diffusers")
    index = found[diffusers_dit.INDEX] or {}
    classes = diffusers_dit.classes_of(index, weights.model.num_classes)
    vae = f"{pipeline or '.'}/{diffusers_dit.VAE}"
    if name != diffusers_dit.TRANSFORMER or hub.optional_path(f"{vae}/{picking.CONFIG}") is None:
        vae = None
    return weights._replace(classes=classes, sampling=sampling, vae=vae)


def different_fields(state: dict[str, np.ndarray], model: MDT) -> list[str]:
    """The fields of an MDT that its published file tells otherwise. Raises UserError for a file
    that is no MDT's."""
    layers = model.decoder_layers if model.version == "v1" else None
    found = fields_of(mdt_names.model_from_published(state, layers or None, model.num_heads))
    own = fields_of(model)
    return [name for name in config_files.TOLD if own[name] != found[name]]


def _as_uploaded(
    state: dict[str, np.ndarray], meta: dict, told: dict[str, int | None]
) -> Weights[MDT]:
    """The MDT of a config.json of `convert`, whose parameters must be those it was written with."""
    model = cast(MDT, network_of(meta))
    _check_told(model, told)
    different = different_fields(state, model)
    params = {} if different else mdt_names.params_from_published(state, model)
    if different or params_sha256(params) != meta.get(config_files.SUM):
        differs = f" ({', '.join(different)})" if different else ""
        raise UserError(
            f"its config.json was written for other weights{differs}; to read the file alone move "
            "config.json away"
        )
    return of_meta(meta, params, meta["item"])
