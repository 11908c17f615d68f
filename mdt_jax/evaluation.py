"""How good samples of a small labelled image set are. NumPy and scikit-learn, float64."""

import numpy as np

from mdt_jax.data.images import to_float
from mdt_jax.data.sources import Images


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of feature vectors [N, D], [M, D], each taken as a Gaussian.

    |μ_a − μ_b|² + tr(A + B − 2·(A^½ B A^½)^½), A and B the covariances.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _pixels(images: np.ndarray) -> np.ndarray:
    return to_float(images).reshape(len(images), -1)


def evaluate_samples(
    images: np.ndarray, labels: np.ndarray | None, train: Images, held_out: Images
) -> dict[str, float]:
    """Measure samples (uint8 NHWC; labels: the classes asked for, or None) against real images.

    class_agreement: share of samples that a classifier (an RBF support vector machine trained on
    the real training split) reads as the class asked for; classifier_accuracy: its own accuracy on
    the held-out split. frechet_distance: samples to held-out images, in pixels in [−1, 1];
    frechet_distance_real: the same for as many real training images (at most all of them).
    """
    report = {}
    if labels is not None:
        from sklearn.svm import SVC

        classifier = SVC(C=10).fit(_pixels(train.images), train.labels)
        report["class_agreement"] = float(np.mean(classifier.predict(_pixels(images)) == labels))
        accuracy = classifier.score(_pixels(held_out.images), held_out.labels)
        report["classifier_accuracy"] = float(accuracy)
    real = np.random.RandomState(0).permutation(len(train))[: len(images)]
    reference = _pixels(held_out.images)
    distance = frechet_distance(_pixels(images), reference)
    distance_real = frechet_distance(_pixels(train.images[real]), reference)
    return report | {
        "num_samples": len(images),
        "frechet_distance": distance,
        "frechet_distance_real": distance_real,
        "frechet_ratio": distance / distance_real,
    }
