"""The evaluator: metrics of samples against a reference."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from mdt_jax.data import sources
from mdt_jax.evaluation import metrics, references
from mdt_jax.evaluation.feature_networks import (
    Classifier,
    Dinov2Features,
    InceptionFeatures,
    PixelFeatures,
    load_dinov2,
    load_inception,
)
from mdt_jax.evaluation.features import FeatureCache, FeatureSet, extract
from mdt_jax.evaluation.image_sets import ArrayImages, ImageSet, check_images, open_images
from mdt_jax.evaluation.npz_files import Header
from mdt_jax.evaluation.references import STATISTICS, Reference
from mdt_jax.models.dinov2 import WIDTH
from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import log0

FEATURES = ("inception", "dinov2", "pixels", "classifier")
SLOW = ("inception", "dinov2")  # of FEATURES: extracting them takes long
BEST = ("fid", "frechet_distance")  # metrics that choose a run's best checkpoint; less is better
NEIGHBOURS = 3  # k of precision and recall


class Evaluator:
    """Measures samples against a reference, whose features are extracted once."""

    def __init__(
        self,
        reference: Reference,
        features: Sequence[str],
        inception: str = "",
        dinov2: str = "",
    ):
        """features: of FEATURES. inception, dinov2: paths of their weights. Raises UserError."""
        unknown = [name for name in features if name not in FEATURES]
        if unknown:
            raise UserError(f"unknown features {unknown[0]!r}; choose of {', '.join(FEATURES)}")
        self.reference = reference
        self.networks: dict[
            str, InceptionFeatures | Dinov2Features | PixelFeatures | Classifier
        ] = {}
        self._classifier: Classifier | None = None
        self._reference_features: FeatureSet | None = None
        self._reference_extracted = False
        self._warned: set[str] = set()
        if "inception" in features:
            self._check_statistics("inception", "pool")
            network = self.networks["inception"] = load_inception(inception)
            self._check_sizes("inception", network.sizes)
        if "dinov2" in features:
            self._check_statistics("dinov2", "dinov2")
            network = self.networks["dinov2"] = load_dinov2(dinov2)
            self._check_sizes("dinov2", network.sizes)
        if "pixels" in features:
            self.networks["pixels"] = PixelFeatures(reference.images_for("pixels").shape)
        if "classifier" in features:
            self.networks["classifier"] = self._classifier = Classifier(reference)

    def _check_statistics(self, network: str, feature: str) -> None:
        """Raise UserError where all statistics of the reference are of other networks."""
        if self.reference.gaussians and feature not in self.reference.gaussians:
            raise UserError(
                f"{self.reference.path} has statistics, but no {' and '.join(STATISTICS[feature])} "
                f"of {network}; make a reference of the real images with --features={network}"
            )

    def _check_sizes(self, network: str, sizes: Mapping[str, int]) -> None:
        """Raise UserError where statistics are not of a network's features; sizes: by feature."""
        for name, size in sizes.items():
            statistics = self.reference.gaussians.get(name)
            if statistics is not None and len(statistics.mu) != size:
                feature = name if name == network else f"{network}'s {name}"
                raise UserError(
                    f"{self.reference.path} has statistics of {len(statistics.mu)} features, but "
                    f"{feature} has {size}: they are of another network"
                )

    def check(self, samples: ImageSet) -> None:
        """Raise UserError for samples that cannot be compared with the reference."""
        images = self.reference.images
        if images is not None and images.shape != samples.shape:
            real, generated = ("×".join(map(str, x.shape)) for x in (images, samples))
            raise UserError(
                f"the images of {self.reference.path} are {real}, but those of {samples.path} "
                f"{generated}; compare images of one size"
            )
        least = NEIGHBOURS + 1 if "inception" in self.networks else 2
        for image_set in (samples, images):
            if image_set is not None and len(image_set) < least:
                raise UserError(
                    f"{image_set.path} has too few images: {len(image_set)}; at least {least} are "
                    "needed"
                )
        if self._classifier is not None:
            self._classifier.labels_of(samples)

    def measure(
        self,
        samples: ImageSet,
        samples_cache: FeatureCache | None = None,
        reference_cache: FeatureCache | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        """Measure samples; every process returns the metrics that process 0 computed.

        By inception: fid, kid, sfid, inception_score, precision, recall. By dinov2: fd_dinov2 and
        kd_dinov2, its kernel distance. By pixels: frechet_distance;
        and for a reference with training images frechet_distance_real, that of as many training
        images, and frechet_ratio, the first over the second. By classifier: class_agreement, the
        share of samples classified as their labels, and classifier_accuracy, that of real images.
        A reference without spatial statistics gives no sfid, one without images no precision,
        recall, kid and kd_dinov2. The caches keep features meanwhile. Raises UserError for samples
        that cannot be compared.
        """
        self.check(samples)
        features = extract(self.networks.values(), samples, samples_cache, progress)
        self._extract_reference(reference_cache, progress)
        report = {} if features is None else self._report(samples, features, progress)
        return hosts.broadcast(report)

    def _extract_reference(self, cache: FeatureCache | None, progress: bool) -> None:
        """Extract the reference's features in all processes, the first time; process 0 keeps them.

        The classifier is left out: it compares samples with their labels, not with the reference.
        """
        networks = [net for name, net in self.networks.items() if name != "classifier"]
        if self._reference_extracted or not networks or self.reference.images is None:
            return
        self._reference_features = extract(networks, self.reference.images, cache, progress)
        self._reference_extracted = True

    def _report(self, samples: ImageSet, features: FeatureSet, progress: bool) -> dict[str, float]:
        report: dict[str, float] = {"num_samples": len(samples)}
        if "inception" in self.networks:
            report |= self._compare_inception(features, progress)
        if "dinov2" in self.networks:
            report |= self._compare_dinov2(features, progress)
        if "pixels" in self.networks:
            report |= self._compare_pixels(features)
        if self._classifier is not None:
            agreement = features.rows["classes"] == self._classifier.labels_of(samples)
            report["class_agreement"] = float(np.mean(agreement))
            report["classifier_accuracy"] = self._classifier.accuracy
        return report

    def _compare_inception(self, samples: FeatureSet, progress: bool) -> dict[str, float]:
        real, statistics = self._reference_features, self._statistics()
        report = {"fid": self._distance(samples.gaussians["pool"], statistics["pool"])}
        if real is not None:
            report["kid"] = metrics.kernel_distance(
                real.rows["pool"], samples.rows["pool"], progress
            )
        if "spatial" in statistics:
            spatial = samples.gaussians["spatial"]
            report["sfid"] = metrics.frechet(spatial, statistics["spatial"])
        else:
            self._warn(f"{self.reference.path} has no mu_s and sigma_s: there is no sFID")
        rows = samples.rows
        report["inception_score"] = metrics.inception_score(rows["logits"], rows["pixels"])
        if real is not None:
            report["precision"], report["recall"] = metrics.precision_recall(
                real.rows["pool"], rows["pool"], NEIGHBOURS, progress
            )
        return report

    def _compare_dinov2(self, samples: FeatureSet, progress: bool) -> dict[str, float]:
        real, statistics = self._reference_features, self._statistics()
        width = len(statistics["dinov2"].mu)
        if width != WIDTH:
            self._warn(
                f"FD-DINOv2 is defined with ViT-L/14, of width {WIDTH}, but --dinov2 has width "
                f"{width}: compare it only with distances by the same weights"
            )
        distance = self._distance(samples.gaussians["dinov2"], statistics["dinov2"])
        report = {"fd_dinov2": distance}
        if real is not None:
            report["kd_dinov2"] = metrics.kernel_distance(
                real.rows["dinov2"], samples.rows["dinov2"], progress
            )
        return report

    def _statistics(self) -> dict[str, metrics.Gaussian]:
        """The reference's, by feature: stored, or of all its images."""
        real = self._reference_features
        return self.reference.gaussians or ({} if real is None else real.gaussians)

    def _compare_pixels(self, samples: FeatureSet) -> dict[str, float]:
        assert self._reference_features is not None  # process 0 has them
        real, training = self._reference_features.gaussians["vectors"], self.reference.training
        distance = self._distance(samples.gaussians["vectors"], real)
        if training is None:
            return {"frechet_distance": distance}
        chosen = np.random.RandomState(0).permutation(len(training))[: samples.count]
        vectors = self.networks["pixels"](training.images[chosen])["vectors"]
        distance_real = metrics.frechet(metrics.gaussian(vectors), real)
        return {
            "frechet_distance": distance,
            "frechet_distance_real": distance_real,
            "frechet_ratio": distance / distance_real,
        }

    def _distance(self, samples: metrics.Gaussian, real: metrics.Gaussian) -> float:
        """The Fréchet distance. Warns, once, if it is hard to compare with others."""
        warnings = metrics.reliability_warnings("the samples", samples)
        for line in warnings + metrics.reliability_warnings(self.reference.path, real):
            self._warn(line)
        return metrics.frechet(samples, real)

    def _warn(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            log0(f"warning: {line}")


def evaluate_samples(
    images: np.ndarray,
    labels: np.ndarray | None,
    training: sources.Images,
    held_out: sources.Images,
) -> dict[str, float]:
    """Measure samples of a small data set by their pixels, and by a classifier if labelled.

    images: [N, H, W, C] uint8; labels: [N], the classes they were sampled for, or None.
    """
    features = ("pixels",) if labels is None else ("pixels", "classifier")
    reference = references.of_split("the held-out images", training, held_out)
    return Evaluator(reference, features).measure(ArrayImages("the samples", images, labels))


def fid(
    samples: str | os.PathLike | np.ndarray,
    reference: str | os.PathLike | np.ndarray,
    inception: str | os.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    progress: bool = False,
) -> float:
    """FID of samples against real images or their statistics, as `mdt_jax.evaluate` computes it.

    samples, reference: images [N, H, W, C] uint8, or a path as of --samples and --reference.
    inception: weights of FID's Inception: a file, a folder that `convert` wrote, or hf://….
    image_size: (H, W), or a square's side, to which image files are cropped. Raises UserError for
    images that cannot be compared.
    """
    if isinstance(samples, np.ndarray):
        images = _array_images("the samples", samples)
    else:
        images = open_images(os.fspath(samples), image_size, generated=True)
    if isinstance(reference, np.ndarray):
        real = Reference("the reference", {}, _array_images("the reference", reference))
    else:
        real = references.load(os.fspath(reference), image_size)
    evaluator = Evaluator(real, ("inception",), os.fspath(inception))
    return evaluator.measure(images, progress=progress)["fid"]


def _array_images(name: str, images: np.ndarray) -> ArrayImages:
    check_images(name, Header(images.shape, False, images.dtype))
    return ArrayImages(name, images)
