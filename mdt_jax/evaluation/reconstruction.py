"""What a VAE loses: PSNR, SSIM and rFID of images that are encoded and decoded again."""

import importlib.util
from collections.abc import Collection

import numpy as np

from mdt_jax.data.images import to_uint8
from mdt_jax.evaluation.feature_networks import InceptionFeatures
from mdt_jax.evaluation.features import extract
from mdt_jax.evaluation.image_sets import ImageSet, Slices
from mdt_jax.evaluation.metrics import frechet, psnr, reliability_warnings, ssim
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import log0
from mdt_jax.weights import vae


class Reconstructed:
    """Images encoded to the means of their posteriors and decoded again, an `ImageSet`.

    psnr, ssim: of the images reconstructed so far, [n] for each slice.
    """

    labels, classes = None, ()

    def __init__(self, network: AutoencoderKL, params: dict, images: ImageSet):
        """Raises UserError for too few images, or images of an unsuitable size."""
        if len(images) < 2:
            raise UserError(f"{images.path} has one image; rFID compares at least two")
        if importlib.util.find_spec("skimage") is None:
            raise UserError("SSIM needs scikit-image: pip install scikit-image")
        height, width, _ = images.shape
        if height % network.factor or width % network.factor or min(height, width) < 11:
            raise UserError(
                f"the images of {images.path} are {height}×{width}; the VAE takes multiples of "
                f"{network.factor}, and SSIM 11×11 at least; --image_size crops image files"
            )
        self.path, self.shape = f"{images.path} through the VAE", (height, width, 3)
        self._network, self._images = network, images
        self._mesh = parallel.make_mesh()
        self._params = parallel.put(params, parallel.replicated(self._mesh))
        self._encoder = vae.encoder(network, self._mesh)
        self.psnr, self.ssim = [], []

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        return f"{self._images.name(i)}, through the VAE,"

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        """Reconstruct the slices of the images, and compare each with its originals."""
        for start, images in self._images.slices(size, done):
            images = np.broadcast_to(images, (*images.shape[:3], 3))
            reconstructed = self._reconstruct(start, images)
            self.psnr.append(psnr(images, reconstructed))
            self.ssim.append(ssim(images, reconstructed))
            yield start, reconstructed

    def _reconstruct(self, start: int, images: np.ndarray) -> np.ndarray:
        """[n, H, W, 3] uint8 → the same; start: the number of the first image."""
        rows = len(images) + -len(images) % self._mesh.size  # the encoder itself takes slices
        ((latents, _),) = parallel.map_in_batches(
            lambda batch: self._encoder(self._params, batch), images, rows, self._mesh
        )
        decoded = vae.decode(
            self._network, self._params, latents, scale=1.0,
            name=lambda i: self._images.name(start + i),
        )  # fmt: skip
        return to_uint8(decoded)


def measure_vae(
    reconstructed: Reconstructed,
    images: ImageSet,
    inception: InceptionFeatures | None,
    progress: bool = False,
) -> dict[str, float]:
    """Measure reconstructed images against the images themselves.

    Every process returns psnr (dB) and ssim, means over images, and with an Inception rfid, the
    Fréchet distance between the two sets.
    """
    networks = [] if inception is None else [inception]
    features = extract(networks, reconstructed, progress=progress)
    report: dict[str, float] = {
        "num_images": len(images),
        "psnr": float(np.concatenate(reconstructed.psnr).mean()),
        "ssim": float(np.concatenate(reconstructed.ssim).mean()),
    }
    real_features = extract(networks, images, progress=progress) if networks else None
    if features is not None and real_features is not None:
        ours, real = features.gaussians["pool"], real_features.gaussians["pool"]
        warnings = reliability_warnings(reconstructed.path, ours)
        for line in warnings + reliability_warnings(images.path, real):
            log0(f"warning: {line}")
        report["rfid"] = frechet(ours, real)
    return hosts.broadcast(report)
