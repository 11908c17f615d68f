"""What a VAE loses: PSNR, SSIM and rFID of images that are encoded and decoded again."""

import importlib.util

import numpy as np

from mdt_jax.data.images import to_uint8
from mdt_jax.evaluation.feature_networks import InceptionFeatures
from mdt_jax.evaluation.features import FeatureNetwork, extract
from mdt_jax.evaluation.image_sets import ImageSet
from mdt_jax.evaluation.metrics import frechet, psnr, reliability_warnings, ssim
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.vae import Vae


def check_reconstructible(vae: Vae, images: ImageSet) -> None:
    """Raise UserError for images that cannot be reconstructed or measured."""
    if importlib.util.find_spec("skimage") is None:
        raise UserError("SSIM needs scikit-image: pip install scikit-image")
    if len(images) < 2:
        raise UserError(f"{images.path} has one image; rFID compares at least two")
    (height, width, _), factor = images.shape, vae.network.factor
    if height % factor or width % factor or min(height, width) < 11:
        raise UserError(
            f"the images of {images.path} are {height}×{width}; the VAE takes multiples of "
            f"{factor}, and SSIM 11×11 at least; --image_size crops image files"
        )


class Reconstruction:
    """A feature network that compares images with their reconstructions.

    Images are encoded to the means of their posteriors and decoded again. Gives "psnr" and "ssim"
    [n] float64, and with an Inception "reconstructed" [n, 2048], its features "pool".
    """

    def __init__(self, vae: Vae, inception: InceptionFeatures | None):
        self._vae, self._inception = vae, inception
        self._mesh = parallel.make_mesh()
        self._encode = vae.encoder(self._mesh)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        images = np.broadcast_to(images, (*images.shape[:3], 3))
        size = len(images) + -len(images) % self._mesh.size  # the encoder takes a few at a time
        ((latents, _),) = parallel.map_in_batches(self._encode, images, size, self._mesh)
        decoded = to_uint8(self._vae.decode(latents, name="image {} of a slice".format))
        features = {"psnr": psnr(images, decoded), "ssim": ssim(images, decoded)}
        if self._inception is not None:
            features["reconstructed"] = self._inception(decoded)["pool"]
        return features


def measure_vae(
    vae: Vae, images: ImageSet, inception: InceptionFeatures | None, progress: bool = False
) -> dict[str, float]:
    """Measure what a VAE, whose norm must do nothing, loses of images that passed the check.

    Every process returns psnr (dB) and ssim, means over images, and with an Inception rfid, the
    Fréchet distance between images and reconstructions.
    """
    networks: list[FeatureNetwork] = [Reconstruction(vae, inception)]
    if inception is not None:
        networks.append(inception)
    features = extract(networks, images, progress=progress)
    report: dict[str, float] = {"num_images": len(images)}
    if features is not None:
        report["psnr"] = float(features.rows["psnr"].mean())
        report["ssim"] = float(features.rows["ssim"].mean())
    if features is not None and inception is not None:
        ours, real = features.gaussians["reconstructed"], features.gaussians["pool"]
        warnings = reliability_warnings(f"{images.path} through the VAE", ours)
        for line in warnings + reliability_warnings(images.path, real):
            hosts.log0(f"warning: {line}")
        report["rfid"] = frechet(ours, real)
    return hosts.broadcast(report)
