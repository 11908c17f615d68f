"""Metrics of images: Fréchet and kernel distance, Inception Score, precision, recall, PSNR, SSIM.

NumPy, in float64. Fréchet distance, Inception Score, precision and recall follow ADM's evaluator
(Dhariwal & Nichol 2021, guided-diffusion, evaluations/evaluator.py): FID is the Fréchet distance of
the Inception's features "pool", sFID that of its features "spatial" (Nash et al. 2021, arXiv
2103.03841).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from mdt_jax.runtime.progress import progress_bar

TILE = 4096  # rows compared at once, which bounds the memory
ROUNDING = 1e-13  # rounding error of a squared distance, relative to the squared norms


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    mu: [D], sigma: [D, D], float64. count: the number of features; None if unknown. rows:
    [count, D], the features minus their mean, for at most D features.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    rows: np.ndarray | None = None

    @functools.cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, ascending, and eigenvectors of sigma.

        With `rows` X: those of the smaller matrix XXᵀ/(n − 1), whose positive eigenvalues are the
        same.
        """
        if self.rows is None:
            return np.linalg.eigh(self.sigma)
        return np.linalg.eigh(self.rows @ self.rows.T / (len(self.rows) - 1))

    @property
    def root(self) -> np.ndarray:
        """R [D, r] with RRᵀ = sigma, where r is the numerical rank of sigma."""
        values, vectors = self._eigen
        kept = values > max(values[-1], 0) * len(self.mu) * np.finfo(np.float64).eps
        if self.rows is None:
            return vectors[:, kept] * np.sqrt(values[kept])
        return self.rows.T @ (vectors[:, kept] / np.sqrt(len(self.rows) - 1))

    @property
    def negative(self) -> float:
        """Minus the smallest eigenvalue over the largest; about 0 for a true covariance."""
        values, _ = self._eigen
        return float(max(0, -values[0]) / values[-1]) if values[-1] > 0 else 0.0


class Moments:
    """Accumulates the mean and covariance of features that arrive in batches."""

    def __init__(self):
        self.count, self.origin = 0, None

    def add(self, features: np.ndarray) -> None:
        """Add features [n, D]. Their order and batch size matter only to rounding."""
        features = np.asarray(features, np.float64)
        if self.origin is None:
            self.origin = features.mean(0)  # near the mean, against cancellation
            self.total = np.zeros_like(self.origin)
            self.products = np.zeros((len(self.origin), len(self.origin)))
            self.rows = []
        features = features - self.origin
        self.count += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features
        self.rows.append(features)
        if self.count > len(self.origin):
            self.rows = []  # sigma is smaller

    def gaussian(self) -> Gaussian:
        """The statistics of two or more features; the covariance divides by count − 1."""
        mean = self.total / self.count
        sigma = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        rows = np.concatenate(self.rows) - mean if self.count <= len(mean) else None
        return Gaussian(self.origin + mean, sigma, self.count, rows)


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and covariance of features [N, D], N ≥ 2."""
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def reliability_warnings(name: str, gaussian: Gaussian) -> list[str]:
    """Reasons why a Fréchet distance to a Gaussian is hard to compare; name: what it is of."""
    size, rank = gaussian.root.shape
    warnings = []
    if gaussian.count is not None and gaussian.count <= size:
        warnings.append(
            f"the covariance of {name}, of {gaussian.count} images, has rank {rank} in {size} "
            "dimensions. The distance is exact, but so few images make it too large: compare it "
            "only with distances of as many images"
        )
    elif gaussian.count is None and rank < size:
        warnings.append(
            f"the covariance of {name} has rank {rank} in {size} dimensions: it is of few images, "
            "or some features never change. The distance is exact; few images make it too large"
        )
    if gaussian.negative > 1e-6:
        warnings.append(
            f"the covariance of {name} has negative eigenvalues, which a true covariance never "
            "has. They are taken as 0; other evaluators would meet complex square roots"
        )
    return warnings


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance |μ_a − μ_b|² + tr(A + B − 2·(AB)^½) (Heusel et al. 2017, arXiv 1706.08500).

    tr (AB)^½ is computed as the sum of the singular values of RᵀS, where A = RRᵀ and B = SSᵀ. This
    is real, and exact to rounding for covariances of any rank; the usual square root of AB can have
    complex entries.
    """
    cross = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    gap = np.square(a.mu - b.mu).sum()
    return max(float(gap + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross), 0.0)


def inception_score(logits: np.ndarray, keys: np.ndarray | None = None, split: int = 5000) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)) (Salimans et al. 2016, arXiv 1606.03498), mean over splits.

    logits: [N, classes]. keys: [N, K], which identify the samples; default: the logits. split: the
    largest number of samples in a split. Samples are sorted by the bytes of their keys and dealt
    to the splits in turn, so that the score does not depend on their order and the sizes of splits
    differ by at most one. ADM's evaluator instead takes splits of 5,000 in the order of the file,
    the last of which may be smaller.
    """
    rows = np.ascontiguousarray(logits if keys is None else keys)
    order = rows.view(f"V{rows.shape[1] * rows.itemsize}").ravel().argsort(kind="stable")
    splits, scores = -(-len(logits) // split), []
    for first in range(splits):
        part = np.asarray(logits[order[first::splits]], np.float64)
        part = part - part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):  # p log p is 0 for p = 0
            terms = np.where(p > 0, p * (log_p - np.log(p.mean(0))), 0)
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))


def _squared_distances(a: np.ndarray, b: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """[n, D], [m, D] → [n, m] float64. origin: [D] float64, near both, against cancellation."""
    a, b = a - origin, b - origin
    distances = (-2 * a) @ b.T
    distances += np.square(a).sum(1)[:, None]
    distances += np.square(b).sum(1)
    return distances


def _tiles(count: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, count, TILE)]


def _squared_radii(
    features: np.ndarray, k: int, origin: np.ndarray, advance: Callable[[int], object]
) -> np.ndarray:
    """Squared distance of each feature to its k-th nearest neighbour in the set: [N] float64.

    A small tolerance is added, so that ties count as inside despite rounding.
    """
    nearest = np.full((len(features), k + 1), np.inf)  # k + 1: each feature is its own nearest
    tiles = _tiles(len(features))
    for number, rows in enumerate(tiles):
        for others in tiles[number:]:
            distances = _squared_distances(features[rows], features[others], origin)
            nearest[rows] = _smallest(nearest[rows], distances)
            if others != rows:
                nearest[others] = _smallest(nearest[others], distances.T)
            advance(1)
    norms = [np.square(features[rows] - origin).sum(1) for rows in tiles]
    return nearest.max(1) + ROUNDING * np.concatenate(norms)


def _smallest(nearest: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The count smallest of each row of two arrays, unordered: [n, count], [n, m] → [n, count]."""
    count = nearest.shape[1]
    if distances.shape[1] > count:
        distances = np.partition(distances, count - 1, axis=1)[:, :count]
    both = np.concatenate([nearest, distances], axis=1)
    return np.partition(both, count - 1, axis=1)[:, :count]


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = 3,
    progress: bool = False,
) -> tuple[float, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    Precision is the share of samples in the manifold of the reference, recall the share of the
    reference in the manifold of the samples. A manifold is the union of balls around all features
    of a set, each with its k-th nearest neighbour on the surface. reference, samples: features
    [N, D] and [M, D], N and M above k.
    """
    origin = reference.mean(0, dtype=np.float64)
    sample_tiles, reference_tiles = _tiles(len(samples)), _tiles(len(reference))
    a, b = len(sample_tiles), len(reference_tiles)
    steps = a * (a + 1) // 2 + b * (b + 1) // 2 + a * b
    recalled = np.zeros(len(reference), bool)
    precise = np.zeros(len(samples), bool)
    with progress_bar(steps, progress and steps > 9, "comparing", "step") as bar:
        reference_radii = _squared_radii(reference, k, origin, bar.update)
        sample_radii = _squared_radii(samples, k, origin, bar.update)
        for rows in sample_tiles:
            for others in reference_tiles:
                distances = _squared_distances(samples[rows], reference[others], origin)
                precise[rows] |= (distances <= reference_radii[others]).any(1)
                recalled[others] |= (distances <= sample_radii[rows, None]).any(0)
                bar.update(1)
    return float(precise.mean()), float(recalled.mean())


def kernel_distance(reference: np.ndarray, samples: np.ndarray, progress: bool = False) -> float:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401): an unbiased estimate of the squared MMD.

    The kernel is k(x, y) = (x·y/D + 1)³. The estimate is the mean of k over all pairs of two
    reference features, plus that over all pairs of two samples, minus twice that over all pairs of
    one each; it can be negative. Other programs average it over random subsets of 1,000, which has
    the same expectation. reference, samples: features [N, D] and [M, D], N and M at least 2.
    """
    a, b = _tiles(len(reference)), _tiles(len(samples))
    steps = (len(a) * (len(a) + 1) + len(b) * (len(b) + 1)) // 2 + len(a) * len(b)
    between = 0.0
    with progress_bar(steps, progress and steps > 9, "comparing", "step") as bar:
        within = [_mean_within(features, bar.update) for features in (reference, samples)]
        for rows in a:
            for others in b:
                between += _kernels(reference[rows], samples[others]).sum()
                bar.update(1)
    return float(sum(within) - 2 * between / (len(reference) * len(samples)))


def _mean_within(features: np.ndarray, advance: Callable[[int], object]) -> float:
    """The mean of the kernel over all pairs of two different features."""
    count, tiles, total = len(features), _tiles(len(features)), 0.0
    for number, rows in enumerate(tiles):
        for others in tiles[number:]:
            kernels = _kernels(features[rows], features[others])
            total += kernels.sum() - np.trace(kernels) if others == rows else 2 * kernels.sum()
            advance(1)
    return total / (count * (count - 1))


def _kernels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(x·y/D + 1)³ of all pairs of rows: [n, D], [m, D] → [n, m] float64."""
    base = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    base /= a.shape[1]
    base += 1
    return np.square(base) * base


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio 10·log₁₀(255²/MSE) of pairs of images, in dB.

    a, b: [N, H, W, C] uint8. Returns [N] float64; infinite for equal images.
    """
    error = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of pairs of images (Wang et al. 2004, IEEE TIP 13(4)).

    With the paper's Gaussian window of 11×11 and σ 1.5, averaged over positions and channels. a, b:
    [N, H, W, C] uint8, at least 11×11. Returns [N] float64.
    """
    from skimage.metrics import structural_similarity

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(a, b, strict=True)
    return np.array(
        [structural_similarity(x, y, channel_axis=-1, data_range=255, **settings) for x, y in pairs]
    )
