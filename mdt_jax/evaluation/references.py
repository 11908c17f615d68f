"""References: the real images, or their statistics, with which samples are compared."""

import dataclasses
import functools

import numpy as np

from mdt_jax.data import sources
from mdt_jax.evaluation.features import FeatureSet
from mdt_jax.evaluation.image_sets import ArrayImages, StoredImages, open_images
from mdt_jax.evaluation.metrics import Gaussian
from mdt_jax.evaluation.npz_files import Header, read_array, read_headers
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, file_sha256, is_file, save_arrays

KEPT_IMAGES = 10_000  # images in a reference, for precision and recall; ADM's files have as many
# Names of mean and covariance by feature; those of the Inception are ADM's.
STATISTICS = {
    "pool": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
    "dinov2": ("mu_dinov2", "sigma_dinov2"),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images, their statistics, or both.

    gaussians: of the features in STATISTICS over all real images; empty if they must be computed
    from `images`. images: some of the real images if there are statistics, else all. training: for
    a set that is split, the images that a model may be trained on; `images` are then the held-out
    ones.
    """

    path: str
    gaussians: dict[str, Gaussian]
    images: StoredImages | None
    training: sources.Images | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """Of the npz file, or as the images identify themselves; hexadecimal."""
        if self.images is None or (is_file(self.path) and self.path.endswith(".npz")):
            return file_sha256(self.path)
        return self.images.sha256

    def images_for(self, feature: str) -> StoredImages:
        """The images. Raises UserError for a reference of statistics only."""
        if self.images is None:
            raise UserError(f"{feature} needs images; {self.path} holds statistics only")
        return self.images


def load(
    path: str, image_size: int | tuple[int, int] | None = None, labelled: bool = False
) -> Reference:
    """Read a reference: an npz file with the arrays of STATISTICS, or images.

    path, image_size, labelled: as of `open_images`. Raises UserError.
    """
    if path in sources.PACKAGED:
        return Reference(path, {}, open_images(path, image_size), sources.load(path)[0])
    if not path.endswith(".npz"):
        return Reference(path, {}, open_images(path, image_size, labelled))
    headers = read_headers(path)
    gaussians = _read_gaussians(path, headers)
    if "arr_0" in headers:
        return Reference(path, gaussians, open_images(path, image_size, labelled))
    if not gaussians:
        names = ", ".join(headers) or "none"
        raise UserError(
            f"{path} has neither mu and sigma nor arr_0, the images; its arrays are {names}"
        )
    return Reference(path, gaussians, None)


def of_split(path: str, training: sources.Images, held_out: sources.Images) -> Reference:
    """The held-out images of a set, whose other images a model is trained on."""
    images = ArrayImages(path, held_out.images, held_out.labels, held_out.classes)
    return Reference(path, {}, images, training)


def _read_gaussians(path: str, headers: dict[str, Header]) -> dict[str, Gaussian]:
    """The statistics in an npz file, by feature. Raises UserError."""
    count = _read_count(path) if "count" in headers else None
    gaussians = {}
    for feature, names in STATISTICS.items():
        present = [name for name in names if name in headers]
        if len(present) == 1:
            raise UserError(f"{path} has one of {names[0]} and {names[1]} without the other")
        if present:
            gaussians[feature] = _read_gaussian(path, names, headers, count)
    if "spatial" in gaussians and "pool" not in gaussians:
        raise UserError(f"{path} has mu_s and sigma_s, but neither mu nor sigma")
    return gaussians


def _read_count(path: str) -> int:
    count = read_array(path, "count")
    if count.size != 1 or count.dtype.kind not in "iu" or count.item() < 2:
        raise UserError(
            f"{path}: count is {count!r:.80}; it must be how many images mu is of, 2 or more"
        )
    return count.item()


def _read_gaussian(
    path: str, names: tuple[str, str], headers: dict[str, Header], count: int | None
) -> Gaussian:
    """The mean and covariance with these names, checked. Raises UserError."""
    mu_name, sigma_name = names
    mu_shape, sigma_shape = headers[mu_name].shape, headers[sigma_name].shape
    if len(mu_shape) != 1 or mu_shape[0] == 0 or sigma_shape != mu_shape * 2:
        raise UserError(
            f"{path}: {mu_name} has the shape {list(mu_shape)} and {sigma_name} "
            f"{list(sigma_shape)}; they must be [D] and [D, D]"
        )
    for name in names:
        if headers[name].dtype.kind != "f":
            raise UserError(f"{path}: {name} is {headers[name].dtype}; it must be floating-point")
    mu, sigma = (read_array(path, name).astype(np.float64) for name in names)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: {mu_name} or {sigma_name} is not finite everywhere")
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * np.abs(sigma).max()):
        raise UserError(f"{path}: {sigma_name} is no covariance: it is not symmetric")
    return Gaussian(mu, sigma, count)


def save(path: Path, features: FeatureSet, images: np.ndarray) -> None:
    """Write a reference: arr_0, count, and the arrays of STATISTICS for the features there are.

    With the Inception's features this is ADM's format. features: of all real images; images:
    [n, H, W, C] uint8, some of them. Writes the whole file or none. Raises UserError.
    """
    arrays = {"arr_0": images, "count": np.array(features.count)}
    for feature, gaussian in features.gaussians.items():
        mu, sigma = STATISTICS[feature]
        arrays |= {mu: gaussian.mu, sigma: gaussian.sigma}
    save_arrays(path, arrays)


def images_to_keep(images: StoredImages) -> np.ndarray:
    """KEPT_IMAGES images, or all if there are fewer, chosen at random but always the same.

    Returns [n, H, W, C] uint8.
    """
    order = np.random.RandomState(0).permutation(len(images))
    return images.take(np.sort(order[:KEPT_IMAGES]))
