"""A VAE: its files, and images ⇄ latents in slices on all devices."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from mdt_jax.data.images import to_float
from mdt_jax.diffusion.options import check_finite
from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
from mdt_jax.runtime import files, hub, parallel
from mdt_jax.runtime.backend import HIGHEST
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import kinds, networks, orbax_folders, picking, step_folders, vae_names
from mdt_jax.weights.vae_names import norm_of

SUFFIXES = (".safetensors", ".bin")  # of a VAE's file in a folder of diffusers
# Fields of LatentNorm → those of diffusers' config.json.
RECORDED = {
    "scale": "scaling_factor",
    "shift": "shift_factor plus latents_mean",
    "std": "latents_std",
}


@dataclasses.dataclass(frozen=True)
class Vae:
    """A VAE with its parameters, between images and the latents of a diffusion model.

    path: as the user gave it. norm: of its latents, which are normalised in training and sampling.
    params: float32.
    """

    path: str
    norm: LatentNorm
    network: AutoencoderKL
    params: dict

    @classmethod
    def load(cls, path: str | os.PathLike, **norm: Any) -> "Vae":
        """Read a VAE.

        path: a file (.safetensors, .bin, .pt, .ckpt; in diffusers' or CompVis's layout), a folder
        of diffusers or of `convert`, or hf://…, as of `picking.resolve`. norm: fields of LatentNorm
        that replace those of `recorded_norm`; where there are neither, Stable Diffusion's scale.
        Raises UserError where there is no VAE.
        """
        path = str(path)
        file = picking.resolve(path, "vae")
        if file == path and files.is_dir(path) and not step_folders.is_saved(path):
            expected = " or ".join(f"{picking.DIFFUSERS}{suffix}" for suffix in SUFFIXES)
            raise UserError(f"{path} holds no VAE: expected {expected}")
        network, params = networks.read_network(path, kind="vae")[:2]
        recorded = recorded_norm(path, network.latent_channels)
        return cls(path, LatentNorm(**{**recorded, **norm}), network, params)

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Vae | None":
        """The VAE of a config; None where it trains on pixels.

        Raises UserError where there is none, or its latents are not those of the config.
        """
        if config.vae.path == "identity":
            return None
        given = norm_of(config)
        # An empty shift or std is the VAE's own.
        norm = {name: value for name, value in given._asdict().items() if value != ()}
        vae = cls.load(config.vae.path, **norm)
        channels, factor = vae.network.latent_channels, vae.network.factor
        if (channels, factor) != (config.vae.channels, config.vae.factor):
            raise UserError(
                f"vae.path {vae.path} has latents of {channels} channels at 1/{factor} of the "
                f"size, but vae.channels is {config.vae.channels} and vae.factor "
                f"{config.vae.factor}: set --config.vae.channels={channels} "
                f"--config.vae.factor={factor}"
            )
        return vae

    def check_norm(self) -> None:
        """Raise UserError where the VAE's folder records another norm than the config."""
        recorded = recorded_norm(self.path, self.network.latent_channels)
        for name, value in recorded.items():
            ours = getattr(self.norm, name)
            if ours != value:
                field = RECORDED[name]
                raise UserError(
                    f"vae.{name} is {text_of(ours)}, but the {field} of {self.path} is "
                    f"{text_of(value)}: set vae.{name} to it, or to train with your own take "
                    f"{field} out of the VAE's config.json"
                )

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the parameters, hexadecimal."""
        return kinds.params_sha256(self.params)

    def encoder(
        self, mesh: Mesh, precision: str = HIGHEST
    ) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """A compiled function from images to the (mean, std) of their posteriors, not normalised.

        It takes images [B, H, W, 3] uint8 and returns [B, h, w, c] float32, all split over the
        mesh. Memory does not grow with B. precision: one of PRECISIONS.
        """
        params = parallel.put(self.params, parallel.replicated(mesh))
        return functools.partial(_encode(self.network, mesh, precision), params)

    def decode(
        self,
        latents: np.ndarray,
        *,
        batch_size: int | None = None,
        precision: str = HIGHEST,
        name: Callable[[int], str] = "sample {}".format,
    ) -> np.ndarray:
        """Normalised latents [N, h, w, c] → images [N, H, W, 3] float32, about in [−1, 1].

        batch_size: how many to decode at a time, on all devices together; None means `slice_size`
        on each. precision: one of PRECISIONS. name: what a message calls image i. Raises UserError
        for another number of channels, and NotFiniteError for an image that is not finite.
        """
        if latents.shape[-1] != self.network.latent_channels:
            raise UserError(
                f"the VAE's latents have {self.network.latent_channels} channels, but the model "
                f"draws {latents.shape[-1]}"
            )
        height, width = (self.network.factor * side for side in latents.shape[1:3])
        mesh = parallel.make_mesh()
        params = parallel.put(self.params, parallel.replicated(mesh))
        if batch_size is None:
            batch_size = slice_size(height, width) * mesh.size
        size = -(-batch_size // mesh.size) * mesh.size
        decode = functools.partial(_decode, self.network, precision, params)
        batches = parallel.map_in_batches(decode, self.norm.invert(latents), size, mesh)
        images = np.concatenate([np.zeros((0, height, width, 3), np.float32), *batches])
        check_finite(images, lambda i: f"{name(i)}, decoded by the VAE,")
        return images


def recorded_norm(path: str | os.PathLike, channels: int | None = None) -> dict[str, Any]:
    """The fields of LatentNorm that a VAE's folder records: those of diffusers' config.json, which
    `convert` keeps.

    path: as of `Vae.load`, which can read it; channels: of its latents, where they are known.
    Raises UserError where the fields are no numbers.
    """
    file = hub.local_path(picking.resolve(str(path), "vae"))
    try:
        if files.is_dir(file):
            latents = orbax_folders.read_meta(file).get("latents") or {}
        else:
            latents = vae_names.about_latents(vae_names.read_config(pathlib.Path(file)))
        return vae_names.recorded_norm(latents, channels)
    except UserError as error:
        raise UserError(f"the VAE {path}: {error}") from None


def text_of(values: float | tuple[float, ...]) -> str:
    """Numbers as a config's field has them."""
    return ",".join(f"{value!r}" for value in np.atleast_1d(values).tolist())


def slice_size(height: int, width: int) -> int:
    """How many images a device takes at a time: eight of 256×256, or as many pixels of others."""
    return max(1, 8 * 256**2 // (height * width))


def from_uint8(images: jax.Array) -> jax.Array:
    """uint8 0…255 → float32 in [−1, 1]: x/127.5 − 1, with the bits that NumPy gives.

    A table of 256 values, because XLA would multiply by 1/127.5, which rounds otherwise.
    """
    return jnp.asarray(to_float(np.arange(256, dtype=np.uint8)))[images]


def _encode(network: AutoencoderKL, mesh: Mesh, precision: str) -> jax.stages.Wrapped:
    """A jitted function (params, images) → (mean, std), as of `Vae.encoder`."""

    def moments(params, images):
        count, height, width, _ = images.shape
        most = min(slice_size(height, width), count)
        size = next(n for n in range(most, 0, -1) if count % n == 0)

        def of_slice(images):
            with jax.default_matmul_precision(precision):
                return network.apply({"params": params}, from_uint8(images), method="encode")

        slices = images.reshape(-1, size, *images.shape[1:])
        return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), jax.lax.map(of_slice, slices))

    split = PartitionSpec(parallel.AXES)
    return jax.jit(
        jax.shard_map(moments, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)
    )


@functools.partial(jax.jit, static_argnames=("network", "precision"))
def _decode(network: AutoencoderKL, precision: str, params, latents):
    with jax.default_matmul_precision(precision):
        return network.apply({"params": params}, latents, method="decode")
