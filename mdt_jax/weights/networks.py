"""Networks and their parameters from wherever they lie, and to where others can read them."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import config as configs
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.inception import Inception
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.models.resize import resize_grid
from mdt_jax.runtime import hosts, hub, keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason
from mdt_jax.runtime.progress import log
from mdt_jax.weights import inception_names, mdt_names, orbax_folders, torch_files, vae_names

ITEMS = ("ema", "raw")
# The folder that `save` writes holds one kind of parameters, whichever it was.
_ONLY = "weights"


Network = MDT | AutoencoderKL | Inception
SomeNetwork = TypeVar("SomeNetwork", bound=Network)


class Weights(NamedTuple, Generic[SomeNetwork]):
    """A network and its parameters.

    config: of the run they come from, if any. item: which of a run's parameters they are, one of
    ITEMS; None where it is not known, as of a file. classes: their names in the run's data, if
    known. step: of the run, if known. latents: of a VAE, as `vae_names.about_latents` has it.
    vae_sha256: of the VAE that the run was trained with, if known.
    """

    model: SomeNetwork
    params: dict
    config: ConfigDict | None = None
    item: str | None = None
    classes: tuple[str, ...] = ()
    step: int | None = None
    latents: dict | None = None
    vae_sha256: str | None = None


class _Kind(NamedTuple):
    """How a kind of network is put into folders and published files."""

    model: type
    name: str
    shapes: Callable[[Any], dict]
    to_published: Callable[[Any, dict], dict[str, np.ndarray]]


KINDS = {
    "mdt": _Kind(
        MDT,
        "an MDT",
        lambda model: jax.eval_shape(lambda key: init_params(model, key), keys.key(0)),
        mdt_names.published_from_params,
    ),
    "vae": _Kind(AutoencoderKL, "a VAE", vae_names.shapes, vae_names.to_published),
    "inception": _Kind(
        Inception,
        "FID's Inception",
        inception_names.shapes,
        inception_names.to_published,
    ),
}


def kind_of(model: Network) -> str:
    """The key in KINDS of a network."""
    return next(key for key, kind in KINDS.items() if isinstance(model, kind.model))


def describe(model: Network) -> str:
    """A network in a line."""
    if isinstance(model, MDT):
        height, width = model.input_size
        return (
            f"MDT {model.version}, hidden size {model.hidden_size}, depth {model.depth} "
            f"({model.decoder_layers} decode), {model.num_heads} heads, patch {model.patch_size}, "
            f"{model.num_classes} classes, inputs {height}×{width}×{model.in_channels}"
        )
    if isinstance(model, AutoencoderKL):
        return (
            f"a VAE of levels {', '.join(map(str, model.channels))}, {model.layers} layers each, "
            f"latents of {model.latent_channels} channels at 1/{model.factor} of the size"
        )
    return f"FID's Inception with {model.num_classes} logits"


def read_network(
    path: str | os.PathLike,
    params: str = "ema",
    decoder_layers: int | None = None,
    kind: str | None = None,
) -> Weights[Any]:
    """Any network's weights; arguments as in `load_weights`.

    kind: the key in KINDS that the network must have. Raises UserError.
    """
    if params not in ITEMS:
        raise UserError(f"params is {params!r}; choose one of {', '.join(ITEMS)}")
    if not str(path):
        raise UserError("checkpoint '' does not exist")
    local = hub.local_path(str(path))
    if os.path.isdir(local) or local.suffix not in torch_files.SUFFIXES:
        if decoder_layers is not None:
            raise UserError(f"decoder_layers is for published files; {path} tells its own")
        found = _read_folder(local, params)
    else:
        try:
            found = _from_published(torch_files.read(local), decoder_layers, kind, local)
            # Now the file is let go. Saving would make one more copy of NumPy's arrays.
            found = found._replace(params=jax.tree.map(jnp.asarray, found.params))
            classes = torch_files.read_classes(local)
            if isinstance(found.model, MDT) and len(classes) == found.model.num_classes:
                found = found._replace(classes=classes)
        except UserError as error:
            name = "" if str(error).startswith(str(local)) else f"{path}: "
            raise UserError(f"{name}{error}") from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            # Shapes that nobody thought of, in a file by the right names.
            raise UserError(f"{path}: its arrays do not fit together: {reason(error)}") from None
    _check_finite(found.params, path)
    if kind is not None and not isinstance(found.model, KINDS[kind].model):
        held = KINDS[kind_of(found.model)].name
        raise UserError(f"{path} holds {held}, not {KINDS[kind].name}")
    return found


def _check_finite(params: dict, path: str | os.PathLike) -> None:
    """Raise UserError, naming the first array that is not, where parameters are not finite."""
    for place, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise UserError(f"{path}: {name} is not finite everywhere: the weights are damaged")


def _from_published(
    state: Mapping[str, np.ndarray],
    decoder_layers: int | None,
    wanted: str | None,
    path: pathlib.Path,
) -> Weights:
    """The kind is read from the names; where they tell nothing it is tried as what is wanted."""
    latents = None
    if vae_names.is_vae(state) or wanted == "vae":
        told = vae_names.read_config(path)
        model, params = vae_names.from_published(state, vae_names.norm_groups(told))
        latents = vae_names.about_latents(told)
    elif inception_names.is_inception(state) or (
        wanted == "inception" and "pos_embed" not in state
    ):
        model, params = inception_names.from_published(state)
    else:
        model = mdt_names.model_from_published(state, decoder_layers)
        params = mdt_names.params_from_published(state, model)
    if decoder_layers is not None and not isinstance(model, MDT):
        raise UserError(f"decoder_layers is for MDT; this is {KINDS[kind_of(model)].name}")
    return Weights(model, params, latents=latents)


def _read_folder(path: pathlib.Path, params: str) -> Weights:
    """From a workdir, its checkpoints folder, one step of it, or a folder of `save`."""

    def network(meta):
        if "config" in meta:
            return MDT.from_config(configs.complete(meta["config"]))
        fields = dict(meta["model"])
        kind = KINDS[fields.pop("kind")]
        return kind.model(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    def choose(meta):
        items = list(meta["checksums"])
        item = _ONLY if _ONLY in items else {"ema": "ema", "raw": "params"}[params]
        model = network(meta)
        return item, KINDS[kind_of(model)].shapes(model)

    arrays, meta = orbax_folders.load(path, choose)
    config = configs.complete(meta["config"]) if "config" in meta else None
    item = meta["item"] if _ONLY in meta["checksums"] else params
    classes, step = tuple(meta.get("classes", ())), meta["step"] or None
    told = meta.get("latents"), meta.get("files_sha256", {}).get("vae.path")
    return Weights(network(meta), arrays, config, item, classes, step, *told)


def load_weights(
    path: str | os.PathLike,
    params: str = "ema",
    decoder_layers: int | None = None,
    input_size: tuple[int, int] | None = None,
) -> Weights[MDT]:
    """An MDT's weights, and the config of the run they come from, if any.

    path: a workdir, its checkpoints folder, one step of it, a folder that `convert` wrote, a
    published file (.pt, .pth, .bin, .ckpt, .safetensors), or hf://OWNER/REPOSITORY/FILE.
    params: "ema", or "raw" for those the optimiser sees; a file has but one kind.
    decoder_layers: what a published file of MDT v1 does not tell (None: 2).
    input_size: (H, W) of latents (or pixels) the model is to take. Where the weights are for
    another size, position embeddings and bias tables are resampled, and this is said on stderr.
    Raises UserError where there is nothing to load, or what is there is damaged or another network.
    """
    found = read_network(path, params, decoder_layers, "mdt")
    if input_size is None or tuple(input_size) == found.model.input_size:
        return found
    patch, (height, width) = found.model.patch_size, input_size
    if min(height, width) < patch or height % patch or width % patch:
        raise UserError(f"input_size is {height}×{width}; {path} asks for multiples of {patch}")
    model = found.model.clone(input_size=(height, width))
    log(f"{path}: {_resampled(found.model, model)}")
    resampled = resize_grid(found.params, found.model.grid, model.grid)
    return found._replace(model=model, params=resampled)


def _resampled(old: MDT, new: MDT) -> str:
    sizes = (f"{rows}×{columns}" for rows, columns in (old.grid, new.grid))
    return "position embeddings and bias tables resampled from {} to {} tokens".format(*sizes)


def params_sha256(params: dict) -> str:
    """SHA-256 of a network's parameters by name, independent of their file; hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode())
        leaf = hosts.fetch(leaf) if isinstance(leaf, jax.Array) else leaf
        digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return digest.hexdigest()


def save(path: str | os.PathLike, weights: Weights) -> None:
    """Write parameters: a published file where the suffix is one of its, else an Orbax folder.

    Whole or not at all. A folder keeps the config of the run, if it is of this model. Raises
    UserError where the published code has no place for the model, and where the disk is full.
    """
    path, kind, model = pathlib.Path(path), kind_of(weights.model), weights.model
    if path.suffix in torch_files.SUFFIXES:
        torch_files.write(path, KINDS[kind].to_published(model, weights.params), weights.classes)
        return
    config = weights.config
    if config is not None and _fields(MDT.from_config(config)) == _fields(model):
        meta = {"config": config.to_dict()}
    else:
        meta = {"model": {"kind": kind, **_fields(model)}}
    meta |= {"item": weights.item, "classes": weights.classes, "step": weights.step}
    if weights.latents:
        meta["latents"] = weights.latents
    if weights.vae_sha256:
        meta["files_sha256"] = {"vae.path": weights.vae_sha256}
    orbax_folders.save_folder(path, _ONLY, weights.params, meta)


def unrecorded(weights: Weights) -> list[str]:
    """What a published file of a network does not tell, for whoever reads it."""
    said, model = [], weights.model
    if isinstance(model, MDT):
        if model.version == "v1" and model.decoder_layers != mdt_names.DECODER_LAYERS:
            said.append(f"to be read with decoder_layers={model.decoder_layers}")
        for field in ("masked_shortcut", "asymmetric"):
            if not getattr(model, field):
                said.append(f"that {field} was False, which concerns the masked pass alone")
    elif isinstance(model, AutoencoderKL):
        told: dict[str, object] = dict(weights.latents or {})
        if model.groups != min(32, *model.channels):
            told["norm_num_groups"] = model.groups
        if told:
            said.append(f"to be read beside a config.json of {json.dumps(told)}")
    return said


def _fields(model: Network) -> dict:
    """What makes the network: every field but those that only say how it is computed."""
    computed = ("dtype", "remat", "gather", "unroll", "transpose", "parent", "name")
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {name: value for name, value in fields.items() if name not in computed}


def start_from(config: ConfigDict, model: MDT, key: jax.Array) -> tuple[dict, dict, list[str]]:
    """(parameters, EMA, what is new) for a run that starts from init.checkpoint.

    A file gives both. Where the number of classes differs the label table is drawn anew from `key`.
    Where the grid of tokens differs it is an error, or with init.resize position embeddings and
    bias tables are resampled. Raises UserError where the networks, or the scale of a VAE's
    latents, differ in anything else.
    """
    path = config.init.checkpoint
    source, ema, theirs, *_ = load_weights(path)
    is_file = hub.local_path(path).is_file()
    untold = is_file and source.version == "v1" and source.depth == model.depth
    if untold and 0 < model.decoder_layers != source.decoder_layers:
        source, ema, *_ = load_weights(path, decoder_layers=model.decoder_layers)
    params = ema if is_file else load_weights(path, params="raw").params
    ours, others = _fields(model), _fields(source)
    # Seen to below, or without parameters of their own.
    free = ("input_size", "num_classes", "asymmetric", "masked_shortcut")
    different = [
        f"{name} is {others[name]} there and {value} here"
        for name, value in ours.items()
        if name not in free and others[name] != value
    ]
    if theirs is not None:
        different += [
            f"{name} is {there} there and {here} here"
            for name, there, here in (
                ("vae.scale", theirs.vae.scale, config.vae.scale),
                ("diffusion.steps", theirs.diffusion.steps, config.diffusion.steps),
            )
            if there != here
        ]
    if different:
        raise UserError(f"init.checkpoint {path} is of another network: {'; '.join(different)}")
    said = []
    if source.grid != model.grid:
        if not config.init.resize:
            old, new = (f"{rows}×{columns}" for rows, columns in (source.grid, model.grid))
            raise UserError(
                f"init.checkpoint {path} is for {old} tokens and the config for {new}; "
                "init.resize=True resamples position embeddings and bias tables"
            )
        params, ema = (resize_grid(tree, source.grid, model.grid) for tree in (params, ema))
        said.append(_resampled(source, model))
    if source.num_classes != model.num_classes:
        fresh = {k: v for k, v in init_params(model, key).items() if k == "label_embed"}
        params, ema = (
            {**{k: v for k, v in tree.items() if k != "label_embed"}, **fresh}
            for tree in (params, ema)
        )
        said.append(
            f"a new label table: {source.num_classes} classes there, {model.num_classes} here"
        )
    return params, ema, said
