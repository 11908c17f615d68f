"""benchmarks/sampling_noise.py against the spread of many draws."""

import sys

import numpy as np
import pytest

from mdt_jax.evaluation.metrics import frechet, gaussian, inception_score, precision_recall
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import sampling_noise  # noqa: E402


def draws(random, count, size, scale=1.1):
    """Features [count, size] of samples, correlated and not below 0, as an Inception's."""
    mix = np.random.default_rng(9).standard_normal((size, size)) / np.sqrt(size)
    return np.maximum(random.standard_normal((count, size)) @ mix * scale + 0.4, 0)


@pytest.mark.parametrize(("count", "size"), [(1000, 8), (800, 32), (1600, 64)])
def test_the_error_of_fid_is_the_spread_of_draws(count, size):
    """The delta method, in 200 draws; the spread is known to 5 %. With 25 samples for each feature
    the error is a little too large."""
    random = np.random.default_rng(0)
    reference = gaussian(draws(random, 20_000, size, 1.0))
    distances, errors = [], []
    for _ in range(200):
        rows = draws(random, count, size)
        distances.append(frechet(gaussian(rows), reference))
        halves = (rows[:300], rows[300:])
        errors.append(sampling_noise.frechet_error(lambda h=halves: h, reference))
    ratio = np.mean(errors) / np.std(distances, ddof=1)
    assert 0.85 < ratio < (1.15 if count / size > 100 else 1.4)


def test_the_error_of_the_score_is_the_spread_of_draws():
    random = np.random.default_rng(1)
    weights = 2 * random.standard_normal((8, 10))
    scores, errors = [], []
    for _ in range(200):
        logits = random.standard_normal((500, 8)) @ weights
        whole, error = sampling_noise.score_error(logits)
        assert whole == pytest.approx(inception_score(logits))
        scores.append(whole)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(scores, ddof=1), rel=0.2)


def test_the_errors_of_precision_and_recall_are_the_spread_of_draws():
    random = np.random.default_rng(2)
    reference = random.standard_normal((500, 6))
    shares = np.array(
        [precision_recall(reference, 1.15 * random.standard_normal((1000, 6))) for _ in range(60)]
    )
    for (mean, spread), count in zip(
        zip(shares.mean(0), shares.std(0, ddof=1), strict=True), (1000, 500), strict=True
    ):
        assert sampling_noise.share_error(mean, count) == pytest.approx(spread, rel=0.3)


def test_verdicts_of_another_draw_of_the_same_samples_are_within():
    """99 % of pairs of draws; a distribution that differs is outside."""
    random = np.random.default_rng(3)
    reference = gaussian(draws(random, 4000, 8, 1.0))

    def figure(scale):
        rows = draws(random, 1000, 8, scale)
        return frechet(gaussian(rows), reference), sampling_noise.frechet_error(
            lambda: [rows], reference
        )

    within = 0
    for _ in range(100):
        (published, _), (ours, error) = figure(1.1), figure(1.1)
        within += abs(ours - published) <= sampling_noise.tolerance(error, 6)
    assert within >= 95
    (published, _), (ours, error) = figure(1.1), figure(1.2)
    assert abs(ours - published) > sampling_noise.tolerance(error, 6)


def test_few_samples_are_farther_away_by_the_bias():
    """In one dimension the squared distance of the means alone is σ²/N, and that of the standard
    deviations about σ²/2N."""
    reference = gaussian(np.array([[-2.0], [2.0], [0.0]]))  # σ² = 4
    biases = [sampling_noise.frechet_bias(reference, 50, seed, each=20) for seed in range(400)]
    assert np.mean(biases) == pytest.approx(1.5 * 4 / 50, rel=0.15)
