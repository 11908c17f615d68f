"""Measures as ADM's evaluator defines them, in NumPy."""

import numpy as np


def adm_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """ADM's: means, np.cov, and the trace of a square root of the product's, by its eigenvalues."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) + len(b) < a.shape[1]:  # turned into fewer dimensions, whose zeros make less noise
        axes, _ = np.linalg.qr(np.concatenate([a, b]).T)
        a, b = a @ axes, b @ axes
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots


def adm_precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3):
    """Every distance on its own, none left out."""

    def distances(a, b):
        return np.array([np.linalg.norm(np.float64(b) - row, axis=1) for row in np.float64(a)])

    def radii(x):
        return np.sort(distances(x, x), axis=1)[:, k]

    between = distances(samples, reference)
    precision = (between <= radii(reference)).any(1).mean()
    return precision, (between <= radii(samples)[:, None]).any(0).mean()
