"""Networks with their parameters: read from runs, folders and files of any kind, and saved."""

import dataclasses
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import config as configs
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.inception import Inception
from mdt_jax.models.mdt import MDT
from mdt_jax.models.resize import resize_grid
from mdt_jax.runtime import files, hosts, hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import read_json, reason
from mdt_jax.runtime.progress import log
from mdt_jax.weights import (
    config_files,
    diffusers_dit,
    foreign,
    inception_names,
    mdt_names,
    orbax_folders,
    picking,
    torch_files,
    vae_names,
)

ITEMS = ("ema", "raw")  # the parameters of a run
_STEP_ITEMS = {"ema": "ema", "raw": "params"}  # what a step's folder calls them
# How the published sample.py of DiT draws; SiT's has an adaptive solver that mdt_jax lacks.
DIT_SAMPLING = {"guidance": "constant", "guidance_scale": 4.0}
SIT_SAMPLING = DIT_SAMPLING | {"objective": "flow", "sampler": "euler"}
_ONLY = "weights"  # what a folder of `save` calls its parameters, whichever they are

Network = MDT | AutoencoderKL | Inception
SomeNetwork = TypeVar("SomeNetwork", bound=Network)


class Weights(NamedTuple, Generic[SomeNetwork]):
    """A network and its parameters.

    config: of the run that trained it, if any. item: which of the run's parameters they are, one of
    ITEMS; None where unknown, as of a file. classes: their names in the run's data, if known.
    step: of the run, if known. latents: of a VAE, as of `vae_names.about_latents`. vae_sha256: of
    the VAE that the run was trained with, if known. sampling: fields of SampleOptions that go with
    a published file, which has no config. stored: the type of a file's floats where it is not
    float32; the parameters are float32 in any case. vae: the path of the VAE in the same folder.
    """

    model: SomeNetwork
    params: dict
    config: ConfigDict | None = None
    item: str | None = None
    classes: tuple[str, ...] = ()
    step: int | None = None
    latents: dict | None = None
    vae_sha256: str | None = None
    sampling: Mapping[str, Any] = types.MappingProxyType({})
    stored: str | None = None
    vae: str | None = None


class _Kind(NamedTuple):
    """A kind of network. names: the module with its published names and layouts."""

    model: type
    name: str
    names: types.ModuleType


KINDS = {
    "mdt": _Kind(MDT, "an MDT", mdt_names),
    "vae": _Kind(AutoencoderKL, "a VAE", vae_names),
    "inception": _Kind(Inception, "FID's Inception", inception_names),
}


def kind_of(model: Network) -> str:
    """The key in KINDS of a network."""
    return next(key for key, kind in KINDS.items() if isinstance(model, kind.model))


def shapes_of(model: Network) -> dict:
    """The parameters of a network as shapes."""
    return KINDS[kind_of(model)].names.shapes(model)


def describe(model: Network) -> str:
    """A network in a line."""
    if isinstance(model, MDT):
        height, width = model.input_size
        decode = f" ({model.decoder_layers} decode)" if model.decoder_layers else ""
        return (
            f"{f'MDT {model.version}' if model.decoder_layers else 'DiT'}, "
            f"hidden size {model.hidden_size}, depth {model.depth}{decode}, "
            f"{model.num_heads} heads, patch {model.patch_size}, "
            f"{model.num_classes} classes, inputs {height}×{width}×{model.in_channels}"
        )
    if isinstance(model, AutoencoderKL):
        return (
            f"a VAE of levels {', '.join(map(str, model.channels))}, {model.layers} layers each, "
            f"latents of {model.latent_channels} channels at 1/{model.factor} of the size"
        )
    return f"FID's Inception with {model.num_classes} logits"


def params_sha256(params: dict) -> str:
    """SHA-256 of a network's parameters by name, independent of their file; hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode())
        leaf = hosts.fetch(leaf) if isinstance(leaf, jax.Array) else leaf
        digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return digest.hexdigest()


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
    """What happens to the parameters that depend on the grid of tokens, in a line."""
    sizes = (f"{rows}×{columns}" for rows, columns in (old.grid, new.grid))
    return "position embeddings and bias tables resampled from {} to {} tokens".format(*sizes)


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
        weights = _read_file(pathlib.Path(local), str(path), source, params, told, kind)
    for place, leaf in jax.tree_util.tree_leaves_with_path(weights.params):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise UserError(f"{path}: {name} is not finite everywhere: the weights are damaged")
    if kind is not None and not isinstance(weights.model, KINDS[kind].model):
        held = KINDS[kind_of(weights.model)].name
        raise UserError(f"{path} holds {held}, not {KINDS[kind].name}")
    return weights


def _read_file(
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
        read = torch_files.read_file(
            file, lambda shard: hub.local_path(folder + shard), raw=params == "raw"
        )
        if read.choice:
            left = ", ".join(name[:80] for name in read.others)
            log(f"{path}: the weights are those under '{read.part}'; not used: {left}")
        meta = config_files.read(file)
        if meta is not None:
            weights = _as_uploaded(read.arrays, meta, told)
        else:
            weights = _of_known_kind(read, file, told, kind)
        if diffusers_dit.is_transformer(read.arrays):
            weights = _in_pipeline(weights, folder)
        weights = weights._replace(stored=read.dtype, item=read.item or weights.item)
        del read
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
    read: torch_files.File, file: pathlib.Path, told: dict[str, int | None], kind: str | None
) -> Weights[Any]:
    """`_from_state_dict`, whose error says what the arrays are where they are another program's."""
    try:
        return _from_state_dict(read, file, told, kind)
    except (UserError, ArithmeticError, LookupError, TypeError):
        if what := foreign.from_arrays(read.arrays):
            raise UserError(f"{file} is {what}") from None
        raise


def _from_state_dict(
    read: torch_files.File, file: pathlib.Path, told: dict[str, int | None], kind: str | None
) -> Weights[Any]:
    """The names tell the kind of network; where they do not, it is read as the required kind."""
    state = read.arrays
    if vae_names.is_vae(state) or kind == "vae":
        config = vae_names.read_config(file)
        model, params = vae_names.from_published(state, vae_names.norm_groups(config))
        weights = Weights(model, params, latents=vae_names.about_latents(config))
    elif inception_names.is_inception(state) or (kind == "inception" and "pos_embed" not in state):
        weights = Weights(*inception_names.from_published(state))
    elif diffusers_dit.is_transformer(state):
        config = read_json(file.with_name(picking.CONFIG))
        weights = Weights(*diffusers_dit.from_published(state, config))
    else:
        weights = Weights(*mdt_names.from_published(state, **told))
        if mdt_names.is_dit(state):
            weights = weights._replace(sampling=_sampling_of_dit(read, file))
        return weights
    _check_told(weights.model, told)
    return weights


def _sampling_of_dit(read: torch_files.File, file: pathlib.Path) -> dict[str, Any]:
    """How a DiT or SiT is sampled, which its file's name and its training's flags alone tell."""
    args = read.args or {}
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


def _as_uploaded(
    state: dict[str, np.ndarray], meta: dict, told: dict[str, int | None]
) -> Weights[MDT]:
    """The MDT of a config.json of `convert`, whose parameters must be those it was written with."""
    model = cast(MDT, _network_of(meta))
    _check_told(model, told)
    layers = model.decoder_layers if model.version == "v1" else None
    found = fields_of(mdt_names.model_from_published(state, layers or None, model.num_heads))
    own = fields_of(model)
    different = [name for name in config_files.TOLD if own[name] != found[name]]
    params = {} if different else mdt_names.params_from_published(state, model)
    if different or params_sha256(params) != meta.get(config_files.SUM):
        differs = f" ({', '.join(different)})" if different else ""
        raise UserError(
            f"its config.json was written for other weights{differs}; to read the file alone move "
            "config.json away"
        )
    return _of_meta(meta, params, meta["item"])


def _of_meta(meta: dict, params: dict, item: str | None) -> Weights[Any]:
    """Parameters with what `meta_of` recorded beside them."""
    return Weights(
        _network_of(meta),
        params,
        config=configs.complete(meta["config"]) if "config" in meta else None,
        item=item,
        classes=tuple(meta.get("classes", ())),
        step=meta["step"] or None,
        latents=meta.get("latents"),
        sampling=meta.get("sampling", {}),
        vae_sha256=meta.get("files_sha256", {}).get("vae.path"),
    )


def _read_folder(path: files.Path, params: str) -> Weights[Any]:
    """From a workdir, its checkpoints folder, one step of it, or a folder of `save`."""

    def choose(meta: dict) -> tuple[str, dict]:
        item = _ONLY if _ONLY in meta["checksums"] else _STEP_ITEMS[params]
        return item, shapes_of(_network_of(meta))

    arrays, meta = orbax_folders.load_item(path, choose)
    return _of_meta(meta, arrays, meta["item"] if _ONLY in meta["checksums"] else params)


def _network_of(meta: dict) -> Network:
    """The network that a folder's meta describes."""
    if "config" in meta:
        return MDT.from_config(configs.complete(meta["config"]))
    fields = dict(meta["model"])
    kind = KINDS[fields.pop("kind")]
    return kind.model(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


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


def meta_of(weights: Weights) -> dict:
    """What is known of a network besides its parameters, for JSON: the config of the run, if it is
    of this model, else the model's own fields; the item, classes, step, latents, VAE."""
    config, model = weights.config, weights.model
    if config is not None and fields_of(MDT.from_config(config)) == fields_of(model):
        meta: dict[str, Any] = {"config": config.to_dict()}
    else:
        meta = {"model": {"kind": kind_of(model), **fields_of(model)}}
    meta |= {"item": weights.item, "classes": weights.classes, "step": weights.step}
    if weights.sampling and "config" not in meta:
        meta["sampling"] = dict(weights.sampling)
    if weights.latents:
        meta["latents"] = weights.latents
    if weights.vae_sha256:
        meta["files_sha256"] = {"vae.path": weights.vae_sha256}
    return meta


def unrecorded(weights: Weights) -> list[str]:
    """What a published file of a network cannot record, a line each."""
    lines, model = [], weights.model
    if isinstance(model, MDT):
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


def fields_of(model: Network) -> dict:
    """The fields that define a network, without those that only say how to compute it."""
    computed = (
        "dtype",
        "remat",
        "gather",
        "attention",
        "unroll",
        "modulate_first",
        "ops",
        "parent",
        "name",
    )
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {name: value for name, value in fields.items() if name not in computed}
