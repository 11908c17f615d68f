"""Measures of a small network's checkpoint: its samples, and its losses on real images."""

import functools
import pathlib

import jax
import numpy as np
from features import Classifier, load_images
from ml_collections import ConfigDict

from mdt_jax.data.images import to_uint8
from mdt_jax.data.sources import Images
from mdt_jax.diffusion.options import SampleOptions, balanced_labels
from mdt_jax.evaluation import metrics, references
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.image_sets import ArrayImages
from mdt_jax.models.autoencoder import LatentNorm
from mdt_jax.models.mdt import MDT
from mdt_jax.sampling.generation import generate
from mdt_jax.train.step import Objective, batch_latents, draw_step, sample_losses
from mdt_jax.weights.networks import load_weights

LOSS_DRAWS = 2  # timesteps for each image of a loss
MAX_VALUES = 1000  # of an image whose pixels are compared; more would take longer than training


class Measures:
    """Measures checkpoints against the real images of a set."""

    def __init__(self, images: str, path: str, samples: int):
        """images: the name of a set in features.py; path: of its folder; samples: to measure."""
        self.train, self.held_out = load_images(images, path)
        self.samples, self.classifier = samples, Classifier(images)
        self.known = {"samples": samples, "classifier": self.classifier.sha256}
        self._pixels = None
        if self.held_out.images[0].size <= MAX_VALUES:
            reference = references.of_split("the held-out images", self.train, self.held_out)
            self._pixels = Evaluator(reference, ("pixels",))
        self._real = metrics.gaussian(self.classifier(self.held_out.images)[0])

    def real(self) -> dict[str, float]:
        """The measures of training images, as if they were samples: what a perfect model has."""
        chosen = np.random.RandomState(0).permutation(len(self.train))[: self.samples]
        return self.of_images(self.train.images[chosen], self.train.labels[chosen])

    def of_images(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The measures of images [N, H, W, C] uint8 of classes [N]."""
        features, classes = self.classifier(images)
        measured = {
            "distance": metrics.frechet(metrics.gaussian(features), self._real),
            "class_agreement": float(np.mean(classes == labels)),
        }
        if self._pixels:
            of_pixels = self._pixels.measure(ArrayImages("the samples", images, labels))
            measured["pixel_distance"] = of_pixels["frechet_distance"]
        return measured

    def of(self, folder: pathlib.Path, config: ConfigDict) -> dict[str, float]:
        """The measures of a checkpoint."""
        model, params, *_ = load_weights(folder)
        labels = balanced_labels(self.samples, model.num_classes)
        options, size = SampleOptions.from_config(config), config.sample.batch_size
        drawn = generate(model, params, labels, batch_size=size, options=options)
        losses = {
            name: held_loss(model, params, images, config.diffusion.objective)
            for name, images in (("held_out_loss", self.held_out), ("training_loss", self.train))
        }
        return self.of_images(to_uint8(drawn), labels) | losses


@functools.cache
def _loss(model: MDT, objective: Objective):

    def loss(params, batch, draws):
        batch = {**batch, "latents": batch_latents(batch, None, LatentNorm())}
        return sample_losses(model, objective, params, batch, draws)[1]["mse/full"].mean()

    return jax.jit(loss)


def held_loss(
    model: MDT,
    params: dict,
    images: Images,
    predicts: str = "epsilon",
    steps: int = 1000,
    size: int = 100,
) -> float:
    """The squared error of a full pass over at most 1,000 images, each at LOSS_DRAWS timesteps.

    predicts: a config's diffusion.objective. Only the losses of one objective can be compared. The
    timesteps are spread evenly over each batch and over the draws of an image. They and the noise
    are the same for every network.
    """
    objective = Objective(passes="full", steps=steps, objective=predicts)
    count = min(len(images), 1000) // size * size or len(images)
    chosen = np.random.RandomState(0).permutation(len(images))[:count]
    size, values = min(size, count), []
    for number in range(LOSS_DRAWS * count // size):
        rows = chosen[np.arange(number * size, (number + 1) * size) % count]
        draws = draw_step(jax.random.key(0), number, model, size, steps)
        place = np.arange(size) + np.random.RandomState(number).rand(size)
        round_ = number * size // count
        t = (place + round_ * size / LOSS_DRAWS) % size
        t = t / size if objective.is_flow else t * steps // size
        t = t.astype(np.float32 if objective.is_flow else np.int32)
        draws = draws._replace(t=t, drop_full=np.zeros(size, bool))
        batch = {"images": images.images[rows], "labels": images.labels[rows].astype(np.int32)}
        values.append(float(_loss(model, objective)(params, batch, draws)))
    return float(np.mean(values))
