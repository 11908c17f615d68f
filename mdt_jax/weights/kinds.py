"""The kinds of networks, and what is known of one besides its parameters."""

import dataclasses
import hashlib
import types
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import config as configs
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.dinov2 import Dinov2
from mdt_jax.models.inception import Inception
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts
from mdt_jax.weights import dinov2_names, inception_names, mdt_names, vae_names

ITEMS = ("ema", "raw")  # the parameters of a run

Network = MDT | AutoencoderKL | Inception | Dinov2
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

    @property
    def objective(self) -> str:
        """What a denoiser predicts, as of SampleOptions."""
        if self.config is not None:
            return self.config.diffusion.objective
        return self.sampling.get("objective", "epsilon")


class Kind(NamedTuple):
    """A kind of network. names: the module with its published names and layouts."""

    model: type
    name: str
    names: types.ModuleType


KINDS = {
    "mdt": Kind(MDT, "an MDT", mdt_names),
    "vae": Kind(AutoencoderKL, "a VAE", vae_names),
    "inception": Kind(Inception, "FID's Inception", inception_names),
    "dinov2": Kind(Dinov2, "a DINOv2", dinov2_names),
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
    if isinstance(model, Dinov2):
        return f"a DINOv2 of width {model.width} and depth {model.depth}"
    return f"FID's Inception with {model.num_classes} logits"


def params_sha256(params: dict) -> str:
    """SHA-256 of a network's parameters by name, independent of their file; hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode())
        leaf = hosts.fetch(leaf) if isinstance(leaf, jax.Array) else leaf
        digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return digest.hexdigest()


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


def of_meta(meta: dict, params: dict, item: str | None) -> Weights[Any]:
    """Parameters with what `meta_of` recorded beside them."""
    return Weights(
        network_of(meta),
        params,
        config=configs.complete(meta["config"]) if "config" in meta else None,
        item=item,
        classes=tuple(meta.get("classes", ())),
        step=meta["step"] or None,
        latents=meta.get("latents"),
        sampling=meta.get("sampling", {}),
        vae_sha256=meta.get("files_sha256", {}).get("vae.path"),
    )


def network_of(meta: dict) -> Network:
    """The network that a folder's meta describes."""
    if "config" in meta:
        return MDT.from_config(configs.complete(meta["config"]))
    fields = dict(meta["model"])
    kind = KINDS[fields.pop("kind")]
    return kind.model(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
