"""Distances between sets of features, as ADM's evaluator defines them. NumPy, float64."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

# Rows of either set that are compared at once: bounds the memory of precision and recall.
TILE = 4096
# Of squared distances, as a share of the squared norms that they are computed from.
ROUNDING = 1e-13


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """mu: [D], sigma: [D, D], float64; count: of how many, None where it is not known.

    rows: [count, D], features less their mean, where they are at hand and no more than D.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    rows: np.ndarray | None = None

    @functools.cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Of sigma, or of the rows' smaller matrix, whose eigenvalues above 0 are the same."""
        if self.rows is None:
            return np.linalg.eigh(self.sigma)
        return np.linalg.eigh(self.rows @ self.rows.T / (len(self.rows) - 1))

    @property
    def root(self) -> np.ndarray:
        """[D, r] whose product with its transpose is sigma; r: its rank, to rounding."""
        values, vectors = self._eigen
        kept = values > max(values[-1], 0) * len(self.mu) * np.finfo(np.float64).eps
        if self.rows is None:
            return vectors[:, kept] * np.sqrt(values[kept])
        return self.rows.T @ (vectors[:, kept] / np.sqrt(len(self.rows) - 1))

    @property
    def negative(self) -> float:
        """How far below 0 the least eigenvalue is, as a share of the largest: 0 to rounding."""
        values, _ = self._eigen
        return float(max(0, -values[0]) / values[-1]) if values[-1] > 0 else 0.0


class Moments:
    """Mean and covariance of features that come a few at a time."""

    def __init__(self):
        self.count, self.origin = 0, None

    def add(self, features: np.ndarray) -> None:
        """features: [n, D]; their order and how they are cut does not matter, but for rounding."""
        features = np.asarray(features, np.float64)
        if self.origin is None:
            self.origin = features.mean(0)  # near the mean, so that little is cancelled
            self.total = np.zeros_like(self.origin)
            self.products = np.zeros((len(self.origin), len(self.origin)))
            self.rows = []
        features = features - self.origin
        self.count += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features
        self.rows.append(features)
        if self.count > len(self.origin):
            self.rows = []  # sigma is the smaller

    def gaussian(self) -> Gaussian:
        """Of all that was added, two features at least; the covariance divides by count − 1."""
        mean = self.total / self.count
        sigma = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        rows = np.concatenate(self.rows) - mean if self.count <= len(mean) else None
        return Gaussian(self.origin + mean, sigma, self.count, rows)


def gaussian(features: np.ndarray) -> Gaussian:
    """Of features [N, D], N at least 2."""
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance |μ_a − μ_b|² + tr(A + B − 2·(AB)^½) (Heusel et al. 2017, arXiv 1706.08500).

    tr (AB)^½ is the sum of RᵀS's singular values, A = RRᵀ and B = SSᵀ. So it is real, and exact to
    rounding, whatever the rank; there is no square root of a product that could turn complex.
    """
    cross = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    gap = np.square(a.mu - b.mu).sum()
    return max(float(gap + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross), 0.0)


def inception_score(logits: np.ndarray, keys: np.ndarray | None = None, split: int = 5000) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)), the mean over splits of at most `split` samples.

    logits: [N, classes]; keys: [N, K], what tells the samples apart, by default the logits. Samples
    are sorted by the bytes of their keys and dealt to the splits in turn, so that their order does
    not matter and splits differ in size by one sample at most. Salimans et al. 2016. ADM cuts
    splits of 5,000 in the order of the file, and the last may be smaller.
    """
    rows = np.ascontiguousarray(logits if keys is None else keys)
    order = rows.view(f"V{rows.shape[1] * rows.itemsize}").ravel().argsort(kind="stable")
    splits, scores = -(-len(logits) // split), []
    for first in range(splits):
        part = np.asarray(logits[order[first::splits]], np.float64)
        part = part - part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):  # where p is 0, so is what it adds
            terms = np.where(p > 0, p * (log_p - np.log(p.mean(0))), 0)
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))


def _squared_distances(a: np.ndarray, b: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """[n, D], [m, D] → [n, m] float64. origin: [D] float64, near both, so that little cancels."""
    a, b = a - origin, b - origin
    distances = (-2 * a) @ b.T
    distances += np.square(a).sum(1)[:, None]
    distances += np.square(b).sum(1)
    return distances


def _tiles(count: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, count, TILE)]


def _radii(
    features: np.ndarray, k: int, origin: np.ndarray, moved: Callable[[int], object]
) -> np.ndarray:
    """Squared distance of each feature to its k-th nearest neighbour in the set.

    And a trifle, so that what lies at that distance or is equal is inside, however it is rounded.
    """
    nearest = np.full((len(features), k + 1), np.inf)  # itself is the first

    def look(rows: slice, distances: np.ndarray) -> None:
        if distances.shape[1] > k:
            distances = np.partition(distances, k, axis=1)[:, : k + 1]
        both = np.concatenate([nearest[rows], distances], axis=1)
        nearest[rows] = np.partition(both, k, axis=1)[:, : k + 1]

    tiles = _tiles(len(features))
    for number, rows in enumerate(tiles):
        for others in tiles[number:]:
            distances = _squared_distances(features[rows], features[others], origin)
            look(rows, distances)
            if others != rows:
                look(others, distances.T)
            moved(1)
    norms = [np.square(features[rows] - origin).sum(1) for rows in tiles]
    return nearest.max(1) + ROUNDING * np.concatenate(norms)


def comparisons(count: int, others: int) -> int:
    """How many steps `precision_recall` takes for sets of these sizes."""
    a, b = (len(_tiles(n)) for n in (count, others))
    return a * (a + 1) // 2 + b * (b + 1) // 2 + a * b


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = 3,
    moved: Callable[[int], object] = lambda steps: None,
) -> tuple[float, float]:
    """Share of samples within the reference's manifold, and of the reference in the samples'.

    A manifold is the union of balls around features [N, D], N above k, that reach to each one's
    k-th neighbour. Kynkäänniemi et al. 2019, arXiv 1904.06991, as ADM has it, but in float64.
    moved: told of each of the `comparisons` when it is done.
    """
    origin = reference.mean(0, dtype=np.float64)
    of_reference, of_samples = (_radii(x, k, origin, moved) for x in (reference, samples))
    recalled = np.zeros(len(reference), bool)
    precise = np.zeros(len(samples), bool)
    for rows in _tiles(len(samples)):
        for others in _tiles(len(reference)):
            distances = _squared_distances(samples[rows], reference[others], origin)
            precise[rows] |= (distances <= of_reference[others]).any(1)
            recalled[others] |= (distances <= of_samples[rows, None]).any(0)
            moved(1)
    return float(precise.mean()), float(recalled.mean())


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of pairs of images [N, H, W, C] uint8, in dB: [N] float64."""
    error = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of pairs of images [N, H, W, C] uint8: [N] float64.

    Wang et al. 2004: a Gaussian window of σ 1.5, 11×11, the mean over positions and channels. The
    images are at least 11×11.
    """
    from skimage.metrics import structural_similarity

    return np.array(
        [
            structural_similarity(
                x,
                y,
                channel_axis=-1,
                data_range=255,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )  # fmt: skip
            for x, y in zip(a, b, strict=True)
        ]
    )
