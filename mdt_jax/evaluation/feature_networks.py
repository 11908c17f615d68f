"""The networks that turn images into features: FID's Inception, DINOv2, pixels, a classifier."""

import functools
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import PartitionSpec

from mdt_jax.data import sources
from mdt_jax.data.classes import correspond
from mdt_jax.data.images import to_float
from mdt_jax.evaluation.image_sets import ImageSet
from mdt_jax.evaluation.references import Reference
from mdt_jax.models import dinov2
from mdt_jax.models.dinov2 import Dinov2
from mdt_jax.models.inception import POOL, SPATIAL, WHERE, Features, Inception
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.kinds import params_sha256
from mdt_jax.weights.networks import read_network

EACH_DEVICE = 16  # images a device takes at once; fixed, so that rounding is the same everywhere
MAX_VALUES = 4096  # H·W·C of images whose pixels are compared: their covariance has its square


class _OnDevices:
    """A network in float32 on all devices, applied to images [n, H, W, 3] uint8."""

    def __init__(self, apply: Callable[[dict, jax.Array], Any], params: dict):
        """apply: (params, images) → a tree of arrays of as many rows."""
        self._mesh = parallel.make_mesh()
        self._params = parallel.put(params, parallel.replicated(self._mesh))
        # Each device runs the same program, so that their number changes no bit.
        split = PartitionSpec(parallel.AXES)
        self._apply = jax.jit(
            jax.shard_map(
                apply, mesh=self._mesh, in_specs=(PartitionSpec(), split), out_specs=split
            )
        )

    def __call__(self, images: np.ndarray) -> Any:
        apply = functools.partial(self._apply, self._params)
        size = EACH_DEVICE * self._mesh.size
        batches = list(parallel.map_in_batches(apply, images, size, self._mesh))
        return jax.tree.map(lambda *rows: np.concatenate(rows), *batches)


class InceptionFeatures:
    """FID's Inception: "pool", "spatial", "logits" and "pixels"."""

    def __init__(self, network: Inception, params: dict, note: dict):
        splits = "of at most 5,000 images, dealt in the order of their pixels' SHA-256"
        self.note = {"features": "inception", **note, "inception_score_splits": splits}
        self.sizes = {"pool": POOL, "spatial": SPATIAL}

        def apply(params, images):
            return cast(Features, network.apply({"params": params}, images))._asdict()

        self._network = _OnDevices(apply, params)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        images = _coloured(images)
        features = self._network(images)
        hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
        features["pixels"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(images), -1)
        return features


class Dinov2Features:
    """DINOv2: its class token as "dinov2".

    Images are resized to 224×224 by Pillow's bicubic filter, which rounds to uint8. So does
    dgm-eval (Stein et al. 2023, arXiv 2306.04675) by default, and EDM2's calculate_metrics.py
    (Karras et al. 2024, arXiv 2312.02696) with resize_mode="pil". EDM2's default resizes in
    float32, without rounding.
    """

    def __init__(self, network: Dinov2, params: dict, note: dict):
        resized = f"to {dinov2.SIZE}×{dinov2.SIZE} by Pillow's bicubic filter, rounded to uint8"
        self.note = {"features": "dinov2", **note, "width": network.width, "resized": resized}
        self.sizes = {"dinov2": network.width}
        self._network = _OnDevices(lambda params, x: network.apply({"params": params}, x), params)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            resized = np.stack(list(pool.map(resize, _coloured(images))))
        return {"dinov2": self._network(resized)}


def resize(image: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] uint8, resized to DINOv2's 224×224 pixels."""
    from PIL import Image

    size = (dinov2.SIZE, dinov2.SIZE)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _coloured(images: np.ndarray) -> np.ndarray:
    """Grey images with their channel repeated: [n, H, W, 3]."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def load_inception(path: str) -> InceptionFeatures:
    """FID's Inception with the weights of a file or folder. Raises UserError."""
    return InceptionFeatures(*_load(path, "inception", WHERE))


def load_dinov2(path: str) -> Dinov2Features:
    """DINOv2 with the weights of a file or folder. Raises UserError."""
    return Dinov2Features(*_load(path, "dinov2", dinov2.WHERE))


def _load(path: str, kind: str, where: str) -> tuple[Any, dict, dict]:
    """(network, parameters, their note) of a kind. where: to get the weights. Raises UserError."""
    if not path:
        raise UserError(f"{kind} needs weights, --{kind}=FILE: {where}")
    weights = read_network(path, kind=kind)
    sha256 = params_sha256(weights.params)
    hosts.agree({f"{kind}_sha256": sha256})
    return weights.model, weights.params, {kind: path, f"{kind}_sha256": sha256}


class PixelFeatures:
    """The pixels of small images in [−1, 1] as "vectors"."""

    note = {"features": "pixels"}

    def __init__(self, shape: tuple[int, int, int]):
        """shape: (H, W, C) of an image. Raises UserError for large images."""
        check_small(shape)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"vectors": _vectors(images)}


class Classifier:
    """An RBF support vector machine trained on the pixels of a reference's images: "classes".

    accuracy: the share of held-out real images that it classifies correctly.
    """

    note = {"features": "classifier"}

    def __init__(self, reference: Reference):
        """Train on the reference's training images, or on 80 % of its images. Raises UserError."""
        from sklearn.svm import SVC

        images = reference.images_for("classifier")
        check_small(images.shape)
        if images.labels is None:
            raise UserError(f"{images.path} has no labels, which a classifier needs")
        training = reference.training
        held_out = sources.Images(images.take(np.arange(len(images))), images.labels, [])
        if training is None:
            training, held_out = sources.split(held_out)
        self._labels = np.unique(training.labels).tolist()
        self._path, self._classes = images.path, images.classes
        if len(self._labels) < 2:
            raise UserError(f"{images.path} has one class; a classifier needs at least two")
        if not len(held_out):
            raise UserError(f"{images.path} has too few images of each class to train and test on")
        self._machine = SVC(C=10).fit(_vectors(training.images), training.labels)
        predicted = self(held_out.images)["classes"]
        self.accuracy = float(np.mean(predicted == held_out.labels))

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"classes": self._machine.predict(_vectors(images))}

    def labels_of(self, samples: ImageSet) -> np.ndarray:
        """The labels of samples as the reference numbers its classes: [N] int64.

        Raises UserError for samples without labels, and for a label that no real image has.
        """
        if samples.labels is None:
            raise UserError(f"{samples.path} has no labels, which class agreement needs")
        labels, names = np.asarray(samples.labels).tolist(), samples.classes
        try:
            ours = correspond(set(labels), names, self._labels, self._classes)
        except UserError as error:
            raise UserError(f"{samples.path} against {self._path}: {error}") from None
        unknown = {label for label in labels if ours.get(label) not in self._labels}
        if unknown:
            label = min(unknown)
            raise UserError(
                f"{samples.path} has the label {names[label] if names else label!r}, which no image"
                f" of {self._path} has"
            )
        return np.array([ours[label] for label in labels])


def check_small(shape: tuple[int, int, int]) -> None:
    """Raise UserError for images (H, W, C) that are too large to be compared by their pixels."""
    if np.prod(shape) > MAX_VALUES:
        raise UserError(
            f"images of {'×'.join(map(str, shape))} are too large to be compared by their pixels, "
            f"which takes at most {MAX_VALUES} values an image; compare them by inception"
        )


def _vectors(images: np.ndarray) -> np.ndarray:
    return to_float(images).reshape(len(images), -1)
