"""Images ⇄ latents of a VAE, a few images at a time, on all devices."""

import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mdt_jax.data.images import to_float
from mdt_jax.diffusion.options import check_finite
from mdt_jax.models.autoencoder import VAE_SCALE, AutoencoderKL
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.backend import HIGHEST
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import progress_bar


def at_once(height: int, width: int) -> int:
    """How many images a device takes at a time: eight of 256×256, or as many pixels of others.

    So memory does not grow with their number.
    """
    return max(1, 8 * 256**2 // (height * width))


def sha256(params: dict) -> str:
    """Of a network's parameters by name, whatever file they came from; hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode())
        leaf = hosts.fetch(leaf) if isinstance(leaf, jax.Array) else leaf
        digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return digest.hexdigest()


def from_uint8(images: jax.Array) -> jax.Array:
    """uint8 0…255 → float32 in [−1, 1]: x/127.5 − 1, to the bits that NumPy gives.

    XLA would multiply by 1/127.5, which rounds otherwise.
    """
    return jnp.asarray(to_float(np.arange(256, dtype=np.uint8)))[images]


def encoder(vae: AutoencoderKL, mesh: Mesh, precision: str = HIGHEST) -> Callable:
    """A jitted function (params, images) → (mean, std) of the posteriors.

    images: [B, H, W, 3] uint8, split over the mesh, as [B, h, w, c] float32 mean and std are.
    Each device takes a slice of its images after the other, so that memory does not grow with B.
    precision: of PRECISIONS.
    """

    def moments(params, images):
        count, height, width, _ = images.shape
        most = min(at_once(height, width), count)
        size = next(n for n in range(most, 0, -1) if count % n == 0)

        def one_slice(images):
            with jax.default_matmul_precision(precision):
                return vae.apply({"params": params}, from_uint8(images), method="encode")

        slices = images.reshape(-1, size, *images.shape[1:])
        return jax.tree.map(
            lambda x: x.reshape(count, *x.shape[2:]), jax.lax.map(one_slice, slices)
        )

    split = PartitionSpec(parallel.AXES)
    return jax.jit(
        jax.shard_map(moments, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)
    )


@functools.partial(jax.jit, static_argnames=("vae", "precision"))
def _decode_slice(vae: AutoencoderKL, precision: str, params, latents):
    with jax.default_matmul_precision(precision):
        return vae.apply({"params": params}, latents, method="decode")


def decode(
    vae: AutoencoderKL,
    params: dict,
    latents: np.ndarray,
    *,
    scale: float = VAE_SCALE,
    batch_size: int | None = None,
    precision: str = HIGHEST,
    progress: bool = False,
    name: Callable[[int], str] = "sample {}".format,
) -> np.ndarray:
    """Latents [N, h, w, C] as a model draws them → images [N, H, W, 3] float32, about in [−1, 1].

    scale: what the VAE's latents were multiplied by for training. batch_size: how many are decoded
    at a time, on all devices together; default: `at_once` on each. What is left for the last batch
    is padded, so that any number of latents takes one program. precision: of PRECISIONS. name: what
    a message calls image i. Raises UserError where the VAE's latents have another number of
    channels, and where an image is not finite.
    """
    if latents.shape[-1] != vae.latent_channels:
        raise UserError(
            f"the VAE's latents have {vae.latent_channels} channels, but the model draws "
            f"{latents.shape[-1]}"
        )
    height, width = (vae.factor * side for side in latents.shape[1:3])
    mesh = parallel.make_mesh()
    params = parallel.put(params, parallel.replicated(mesh))
    if batch_size is None:
        batch_size = at_once(height, width) * mesh.size
    size = -(-batch_size // mesh.size) * mesh.size
    images = [np.zeros((0, height, width, 3), np.float32)]
    with progress_bar(len(latents), progress, "decoding", "image") as bar:
        for start in range(0, len(latents), size):
            part = latents[start : start + size] / np.float32(scale)
            padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])
            padded = parallel.put(padded, parallel.split_batch(mesh))
            out = _decode_slice(vae, precision, params, padded)
            images.append(hosts.fetch(out)[: len(part)])
            check_finite(images[-1], lambda i, at=start: f"{name(at + i)}, decoded by the VAE,")
            bar.update(len(part))
    return np.concatenate(images)
