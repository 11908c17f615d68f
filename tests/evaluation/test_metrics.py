"""The measures against torch-fidelity, pytorch-fid, clean-fid and ADM's definitions in NumPy."""

import contextlib
import types

import numpy as np
import pytest

from mdt_jax.evaluation import metrics
from mdt_jax.evaluation.metrics import (
    Moments,
    frechet,
    gaussian,
    inception_score,
    kernel_distance,
    precision_recall,
)
from tests.adm import adm_frechet, adm_precision_recall

torch = pytest.importorskip("torch")
fid = pytest.importorskip("tests.fid_packages")

BOUND = 1e-6  # relative


def features(count: int, size: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Not below 0, correlated and of unequal size, as an Inception's are; float32."""
    mix = np.random.RandomState(9).randn(size, size) / np.sqrt(size) * np.geomspace(2, 0.05, size)
    drawn = np.random.RandomState(seed).randn(count, size)
    return np.maximum(drawn @ mix + 0.4 + shift, 0).astype(np.float32)


@pytest.mark.parametrize("size", [64, 289], ids=["pool", "spatial"])
def test_distances_are_those_of_the_other_evaluators(size):
    a, b = features(2000, size, 1), features(1500, size, 2, 0.1)
    ours = frechet(gaussian(a), gaussian(b))
    stats = [(x.mean(0, dtype=np.float64), np.cov(np.float64(x), rowvar=False)) for x in (a, b)]
    (mu_a, cov_a), (mu_b, cov_b) = stats
    assert ours == pytest.approx(adm_frechet(a, b), rel=BOUND)
    theirs = fid.metric_fid.fid_statistics_to_metric(
        *({"mu": mu, "sigma": cov} for mu, cov in stats), verbose=False
    )
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=BOUND)
    assert ours == pytest.approx(
        fid.fid_score.calculate_frechet_distance(mu_a, cov_a, mu_b, cov_b), rel=BOUND
    )
    assert ours == pytest.approx(
        fid.clean_fid.frechet_distance(mu_a, cov_a, mu_b, cov_b), rel=BOUND
    )


def test_the_closed_form_of_gaussians_along_the_axes():
    a = metrics.Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = metrics.Gaussian(np.array([1.0, 0, 2]), np.diag([4.0, 4.0, 1.0]))
    assert frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-14)
    assert frechet(a, a) == 0
    assert np.isnan(frechet(a, metrics.Gaussian(np.array([np.nan, 0, 0]), b.sigma)))


@pytest.mark.parametrize("counts", [(40, 300), (30, 20)])
def test_covariances_of_any_rank(counts):
    """Against the same samples in a space that holds them, where all has full rank or is exact."""
    a, b = (features(count, 100, seed) for seed, count in enumerate(counts))
    turn, _ = np.linalg.qr(np.random.RandomState(0).randn(100, 100))
    ours = frechet(gaussian(a), gaussian(b))
    assert gaussian(a).root.shape == (100, min(counts[0] - 1, 100))
    assert ours == pytest.approx(frechet(gaussian(a @ turn), gaussian(b @ turn)), rel=1e-9)
    assert ours == pytest.approx(adm_frechet(a, b), rel=1e-5)  # whose roots of 0 are noise
    wide = [np.pad(x, [(0, 0), (0, 50)]) for x in (a, b)]  # 50 features that never move
    assert ours == pytest.approx(frechet(*map(gaussian, wide)), rel=1e-12)


@pytest.mark.parametrize("counts", [(40, 300), (30, 100), (101, 2)])
def test_few_features_need_no_root_of_their_covariance(counts, monkeypatch):
    """The distance is that of the covariances, found from matrices of the number of features."""
    a, b = (gaussian(features(count, 100, seed)) for seed, count in enumerate(counts))
    sizes, eigh = [], np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda m: sizes.append(len(m)) or eigh(m))
    ours = frechet(a, b)
    assert sizes == [min(count, 100) for count in counts]
    for each in (a, b):
        np.testing.assert_allclose(each.root @ each.root.T, each.sigma, rtol=0, atol=1e-12)
        assert each.root.shape[1] == np.linalg.matrix_rank(each.sigma)
    whole = (metrics.Gaussian(each.mu, each.sigma) for each in (a, b))
    assert ours == pytest.approx(frechet(*whole), rel=1e-9)


def test_a_matrix_that_is_no_covariance_is_noticed():
    sigma = np.diag([2.0, 1.0, -0.5])
    assert metrics.Gaussian(np.zeros(3), sigma).negative == pytest.approx(0.25)
    assert gaussian(features(10, 20, 0)).negative < 1e-12


def test_moments_do_not_depend_on_the_slices():
    x = features(1000, 32, 3) + np.float32(100)
    whole = gaussian(x)
    np.testing.assert_allclose(whole.mu, x.mean(0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(whole.sigma, np.cov(np.float64(x), rowvar=False), rtol=0, atol=1e-11)
    for size in (1, 7, 512):
        moments = Moments()
        for start in range(0, len(x), size):
            moments.add(x[start : start + size])
        cut = moments.gaussian()
        assert cut.count == 1000
        np.testing.assert_allclose(cut.mu, whole.mu, rtol=1e-13)
        np.testing.assert_allclose(cut.sigma, whole.sigma, rtol=0, atol=1e-11)


def test_inception_score():
    logits = np.random.RandomState(0).randn(1000, 1008).astype(np.float32) * 3
    for splits in (1, 10):
        order = sorted(range(1000), key=lambda n: logits[n].tobytes())
        dealt = np.concatenate([logits[order[first::splits]] for first in range(splits)])
        theirs = fid.metric_isc.isc_features_to_metric(torch.tensor(dealt), splits, shuffle=False)
        ours = inception_score(logits, split=1000 // splits)
        assert ours == pytest.approx(theirs["inception_score_mean"], rel=BOUND)
    assert inception_score(np.full((9, 5), 800.0)) == pytest.approx(1)
    assert inception_score(1e4 * np.eye(5)) == pytest.approx(5)  # log p is −10⁴, p is 0
    assert inception_score(np.array([[0.0, 1e4]] * 3)) == pytest.approx(1)  # one never is


@pytest.mark.parametrize("count", [7, 1000, 1001, 1601])
def test_the_inception_score_does_not_depend_on_the_order(count):
    """A classifier that is always right: in the order of the classes a split had few of them."""
    labels = np.arange(count) % 10
    sharp = 50 * np.eye(10)[labels]
    assert inception_score(sharp, split=500) == inception_score(sharp[labels.argsort()], split=500)
    assert inception_score(sharp, split=500) > 6.9
    random = np.random.RandomState(count)
    logits, keys = random.randn(count, 20), random.randint(0, 256, (count, 32)).astype(np.uint8)
    for order in (np.argsort(logits[:, 0]), random.permutation(count)):
        for known in (keys, None):
            moved = None if known is None else known[order]
            ours, theirs = (
                inception_score(logits, known, 500), inception_score(logits[order], moved, 500)
            )  # fmt: skip
            assert ours == theirs


@pytest.mark.parametrize("tile", [64, 100, 4096])
def test_precision_and_recall_are_exact(tile, monkeypatch):
    monkeypatch.setattr(metrics, "TILE", tile)
    bars = []

    def progress_bar(total, *_):
        bars.append((total, []))
        return contextlib.nullcontext(types.SimpleNamespace(update=bars[-1][1].append))

    monkeypatch.setattr(metrics, "progress_bar", progress_bar)
    for seed, (count, others) in enumerate([(300, 200), (65, 129), (4, 50)]):
        reference, samples = features(count, 24, seed), features(others, 24, seed + 5, 0.2)
        ours = precision_recall(reference, samples, 3)
        total, steps = bars.pop()
        assert total == len(steps)
        assert ours == adm_precision_recall(reference, samples)
        part, whole = (
            function(torch.tensor(samples).double(), torch.tensor(reference).double())
            for function in (
                fid.metric_prc.calculate_precision_recall_part,
                fid.metric_prc.calculate_precision_recall_full,
            )
        )
        assert ours == pytest.approx(part, abs=1e-6) and ours == pytest.approx(whole, abs=1e-6)
        assert seed or (0.1 < ours[0] < 0.9 and 0.1 < ours[1] < 0.9)


def test_precision_and_recall_far_from_the_origin():
    reference, samples = (features(150, 16, seed, 0.1 * seed) for seed in (0, 1))
    ours = precision_recall(reference, samples)
    far = (np.float64(x) * 2**-20 + 1000 for x in (reference, samples))
    assert 0 < ours[0] < 1 and precision_recall(*far) == ours


def test_equal_features_are_within_each_other():
    """Copies lie at a distance of 0, of which rounding makes a little more or less."""
    same = np.repeat(features(1, 2048, 0), 30, axis=0) * 7
    assert precision_recall(same, same[:9]) == (1, 1)
    moved = same + np.float32(1e-3)
    assert precision_recall(same, moved) == (0, 0)
    x = features(50, 2048, 1)
    assert precision_recall(x, x) == (1, 1)


@pytest.mark.parametrize("tile", [64, 100, 4096])
def test_the_kernel_distance_is_torch_fidelitys(tile, monkeypatch):
    """Of one subset that is the whole; and for sets of unequal size, the definition."""
    monkeypatch.setattr(metrics, "TILE", tile)
    a, b = features(300, 24, 1), features(300, 24, 2, 0.1)
    theirs = fid.metric_kid.kid_features_to_metric(
        torch.tensor(a).double(),
        torch.tensor(b).double(),
        kid_subsets=1,
        kid_subset_size=300,
        verbose=False,
    )
    expected = theirs["kernel_inception_distance_mean"]
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9) and expected > 1e-3
    b = b[:170]
    kernels = [(np.float64(x) @ np.float64(y).T / 24 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    expected = sum(means) - 2 * kernels[2].mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_has_no_bias():
    """Of 20 samples against 30 of the same distribution it is 0 in the mean; FID is far above."""
    drawn = [(features(30, 16, seed), features(20, 16, 1000 + seed)) for seed in range(400)]
    found = np.array([kernel_distance(a, b) for a, b in drawn])
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5
    assert (found < 0).any()
    whole = features(20_000, 16, 1), features(20_000, 16, 2)
    assert np.mean([frechet(*map(gaussian, pair)) for pair in drawn[:50]]) > 100 * frechet(
        *map(gaussian, whole)
    )


def test_psnr_and_ssim():
    from skimage import data
    from skimage.metrics import peak_signal_noise_ratio

    a = data.astronaut()[:64, :64]
    noise = np.random.RandomState(0).randint(-20, 21, (3, *a.shape))
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    a = np.stack([a] * 3)
    theirs = [peak_signal_noise_ratio(*pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.psnr(a, b), theirs, rtol=1e-12)
    assert metrics.psnr(a, a).tolist() == [np.inf] * 3
    assert metrics.ssim(a, a).tolist() == [1, 1, 1]
    assert all(0.5 < value < 1 for value in metrics.ssim(a, b))
