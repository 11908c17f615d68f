"""What samples are measured against: real images, or their statistics as ADM's files have them."""

import dataclasses
import functools
import math
import os
import pathlib

import numpy as np

from mdt_jax.data import sources
from mdt_jax.evaluation import image_sets
from mdt_jax.evaluation.features import FeatureSet
from mdt_jax.evaluation.metrics import Gaussian
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import file_sha256, save_arrays

KEPT = 10_000  # images of a reference for precision and recall, as ADM's files have them
SUFFIXES = {"pool": "", "spatial": "_s"}  # of mu and sigma


@dataclasses.dataclass(frozen=True)
class Reference:
    """gaussians: of the Inception's "pool" and "spatial" over all real images; empty: to be found.

    images: some of them, of a file without statistics all. training: of a set that is split into
    two, what a model may be trained on; `images` are then the others.
    """

    path: str
    gaussians: dict[str, Gaussian]
    images: image_sets.StoredSet | None
    training: sources.Images | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file, or of what the images are, hexadecimal."""
        if self.images is None or (os.path.isfile(self.path) and self.path.endswith(".npz")):
            return file_sha256(self.path)
        return self.images.sha256


def load(path: str, image_size: int | None = None, labelled: bool = False) -> Reference:
    """An npz with mu, sigma (mu_s, sigma_s), or images, or both; or images as of `open_images`.

    Raises UserError.
    """
    if path in sources.PACKAGED:
        images = image_sets.open_images(path, image_size)
        return Reference(path, {}, images, sources.load(path)[0])
    if not path.endswith(".npz"):
        return Reference(path, {}, image_sets.open_images(path, image_size, labelled))
    arrays = image_sets.open_arrays(path)
    statistics = [f"{name}{suffix}" for suffix in SUFFIXES.values() for name in ("mu", "sigma")]
    there = [name for name in statistics if name in arrays]
    if not there and "arr_0" not in arrays:
        raise UserError(
            f"{path} has neither mu and sigma nor arr_0, the images; it has "
            f"{', '.join(arrays) or 'nothing'}"
        )
    images = None
    if "arr_0" in arrays or labelled:
        images = image_sets.open_images(path, image_size, labelled)
    if not there:  # then ADM's evaluator takes the images for both
        return Reference(path, {}, images)
    count = _count(path, arrays["count"][0]) if "count" in arrays else None
    found = {name: _gaussian(path, arrays, suffix, count) for name, suffix in SUFFIXES.items()}
    if found["pool"] is None:
        raise UserError(f"{path} has {' and '.join(there)}, but neither mu nor sigma")
    return Reference(path, {n: g for n, g in found.items() if g is not None}, images)


def _count(path: str, shape: tuple[int, ...]) -> int:
    count = image_sets.read_array(path, "count") if math.prod(shape) == 1 else np.array("an array")
    if count.dtype.kind not in "iu" or count.item() < 2:
        raise UserError(f"{path}: count is {count!r}; it must be how many images mu is of")
    return count.item()


def of_split(path: str, training: sources.Images, held_out: sources.Images) -> Reference:
    """The held-out part of a set that a model is trained on."""
    images = image_sets.Arrays(path, held_out.images, held_out.labels, held_out.classes)
    return Reference(path, {}, images, training)


def _gaussian(path: str, arrays: dict, suffix: str, count: int | None) -> Gaussian | None:
    names = [f"mu{suffix}", f"sigma{suffix}"]
    there = [name in arrays for name in names]
    if not all(there):
        if any(there):
            raise UserError(f"{path} has one of {names[0]} and {names[1]} without the other")
        return None
    mu_shape, sigma_shape = (arrays[name][0] for name in names)
    if len(mu_shape) != 1 or not mu_shape[0] or sigma_shape != mu_shape * 2:
        raise UserError(
            f"{path}: {names[0]} has the shape {list(mu_shape)} and {names[1]} {list(sigma_shape)};"
            " they must be [D] and [D, D]"
        )
    for name in names:
        if arrays[name][2].kind != "f":
            raise UserError(f"{path}: {name} is {arrays[name][2]}; it must be floating-point")
    mu, sigma = (image_sets.read_array(path, name).astype(np.float64) for name in names)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: {' or '.join(names)} is not finite everywhere")
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * np.abs(sigma).max()):
        raise UserError(f"{path}: {names[1]} is no covariance: it is not symmetric")
    return Gaussian(mu, sigma, count)


def save(path: pathlib.Path, found: FeatureSet, images: np.ndarray) -> None:
    """Write a reference as ADM's are: arr_0, mu, sigma, mu_s, sigma_s; and count. Whole or not."""
    arrays = {"arr_0": images, "count": np.array(found.count)}
    for name, suffix in SUFFIXES.items():
        gaussian = found.gaussians[name]
        arrays |= {f"mu{suffix}": gaussian.mu, f"sigma{suffix}": gaussian.sigma}
    save_arrays(path, arrays)


def sample_of(images: image_sets.StoredSet) -> np.ndarray:
    """KEPT of the images, or all, from all over the set and always the same: [n, H, W, C]."""
    count = min(KEPT, len(images))
    chosen = np.sort(np.random.RandomState(0).permutation(len(images))[:count])
    return images.take(chosen)
