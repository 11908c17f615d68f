"""How much the metrics of N samples vary from one draw of the samples to the next.

The network and the reference are fixed; only the samples are random. FID, sFID and the Inception
Score are smooth functions of the distribution of the features, so that to first order a metric of N
samples is its limit plus the mean of an influence function over them (the delta method). Its
standard error is the standard deviation of the influence over √N. The bootstrap is no alternative:
resampled sets hold copies, and their FID is biased upwards as if they were smaller.

- FID and sFID: `frechet_influence`. Its form for Gaussians is the central limit theorem of Rippl,
  Munk & Sturm 2016 (arXiv 1507.04090); the features need not be Gaussian here.
- Inception Score exp(E[KL]): the influence of a sample is the score times its own KL(p(y|x) ‖
  p(y)); the derivative by p(y) vanishes.
- Precision: the binomial standard error of a share of N samples; the reference's manifold is fixed.
- Recall: the binomial standard error of a share of the reference's images, as if each were covered
  or not independently of the others.

tests/benches/test_sampling_noise.py compares each with the spread of many draws: precision and
recall agree as far as 60 draws tell, and the error of FID is 9 to 25 % too large, more with fewer
samples for each feature, because T is then known less well.
"""

from collections.abc import Callable, Iterable

import numpy as np

from mdt_jax.evaluation.metrics import Gaussian, Moments, frechet

# Two figures of one row differ by the noise of both, and five figures are compared: each at 99 %
# (Bonferroni), so that a sound reproduction has a figure outside in at most 5 % of the cases.
DEVIATIONS = 2.576 * np.sqrt(2)


def tolerance(error: float, digits: int) -> float:
    """How far a measured figure may be from a published one of another draw.

    error: the standard error of both. digits: decimals of the published figure, whose rounding is
    added.
    """
    return float(DEVIATIONS * error + 0.5 * 10**-digits)


def share_error(share: float, count: int) -> float:
    """Binomial standard error of a share of `count`."""
    return float(np.sqrt(share * (1 - share) / count))


def frechet_influence(a: Gaussian, b: Gaussian) -> Callable[[np.ndarray], np.ndarray]:
    """The influence of a sample x on the Fréchet distance of samples with the Gaussian `a` to `b`.

    2·(μ_a − μ_b)ᵀ(x − μ_a) + (x − μ_a)ᵀ(I − T)(x − μ_a), up to a constant, where the symmetric T =
    A^−½(A^½BA^½)^½A^−½ is the optimal map from `a` to `b`. Returns a function from rows [n, D] to
    [n] float64.
    """
    # With A = RRᵀ, B = SSᵀ and RᵀS = U·diag(s)·Vᵀ, T is MMᵀ for M = R⁺ᵀ·U·diag(√s). The columns of
    # R are orthogonal, so that R⁺ᵀ is R over their squared lengths.
    root = a.root
    u, s, _ = np.linalg.svd(root.T @ b.root, full_matrices=False)
    m = (root / np.square(root).sum(0)) @ (u * np.sqrt(s))

    def influence(rows: np.ndarray) -> np.ndarray:
        x = np.asarray(rows, np.float64) - a.mu
        return 2 * x @ (a.mu - b.mu) + np.square(x).sum(1) - np.square(x @ m).sum(1)

    return influence


def frechet_error(parts: Callable[[], Iterable[np.ndarray]], reference: Gaussian) -> float:
    """Standard error of the Fréchet distance of samples to a reference.

    parts: gives the samples' features, some rows [n, D] at a time; it is called twice.
    """
    moments = Moments()
    for rows in parts():
        moments.add(rows)
    influence = frechet_influence(moments.gaussian(), reference)
    values = np.concatenate([influence(rows) for rows in parts()])
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def frechet_bias(reference: Gaussian, count: int, seed: int = 0, each: int = 5000) -> float:
    """How far `count` draws of a Gaussian are from it: the bias of FID by the number of samples.

    A finite sample makes FID too large by about c/N, and c depends on the distribution (Chong &
    Forsyth 2020, arXiv 1911.07023); that of the reference stands for the samples'.
    """
    random, moments, root = np.random.default_rng(seed), Moments(), reference.root
    for start in range(0, count, each):
        draws = random.standard_normal((min(each, count - start), root.shape[1]))
        moments.add(draws @ root.T + reference.mu)
    return frechet(moments.gaussian(), reference)


def score_error(logits: np.ndarray) -> tuple[float, float]:
    """(the Inception Score of all samples in one split, its standard error); logits: [N, classes].

    The error is also that of a mean over splits.
    """
    rows = np.asarray(logits, np.float64)
    rows = rows - rows.max(1, keepdims=True)
    log_p = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    p = np.exp(log_p)
    divergences = (p * (log_p - np.log(np.maximum(p.mean(0), 1e-300)))).sum(1)
    score = float(np.exp(divergences.mean()))
    return score, score * float(divergences.std(ddof=1) / np.sqrt(len(rows)))
