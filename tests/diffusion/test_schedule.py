import numpy as np
import pytest

from mdt_jax.diffusion import schedule as sch
from tests.published import VERSIONS, published_numbers

LINEAR = sch.linear_schedule(1000)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "name, timesteps",
    [
        ("full", np.arange(1000)),
        ("250", sch.spaced_timesteps(250, 1000)),
        ("50", sch.spaced_timesteps(50, 1000)),
        ("ddim25", sch.strided_timesteps(25, 1000)),
    ],
)
def test_constants_are_the_published_ones(name, timesteps, version):
    golden = published_numbers(version)
    respaced = sch.respace(LINEAR, timesteps)
    np.testing.assert_array_equal(respaced.timesteps, golden[f"schedule_{name}_timesteps"])
    for constant in ("alphas_cumprod", "posterior_log_variance"):
        expected = golden[f"schedule_{name}_{constant}"]
        np.testing.assert_allclose(getattr(respaced, constant), expected, rtol=1e-12)


def test_spaced_timesteps():
    many = sch.spaced_timesteps(250, 1000)
    assert many[:8].tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert many[-8:].tolist() == [971, 975, 979, 983, 987, 991, 995, 999]
    assert sch.spaced_timesteps(25, 1000).tolist() == [
        0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749,
        791, 832, 874, 916, 957, 999,
    ]  # fmt: skip
    assert sch.spaced_timesteps(1000, 1000).tolist() == list(range(1000))
    assert sch.spaced_timesteps(1, 1000).tolist() == [0]


def test_strided_timesteps_must_exist():
    with pytest.raises(ValueError, match="exactly 600 of 1000"):
        sch.strided_timesteps(600, 1000)


@pytest.mark.parametrize("name", ["log_snr", "karras"])
def test_spacings_between_whole_timesteps(name):
    full = sch.linear_schedule()
    spacing = sch.SPACINGS[name]
    timesteps = spacing(20, full)
    assert timesteps[0] == pytest.approx(0, abs=1e-9) and timesteps[-1] == pytest.approx(999)
    respaced = sch.respace(full, timesteps)
    assert (np.diff(respaced.timesteps) > 0).all() and (np.diff(respaced.alphas_cumprod) < 0).all()
    measure = respaced.half_log_snr
    if name == "karras":
        measure = np.exp(-measure) ** (1 / 7)
    steps = np.diff(measure)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    np.testing.assert_allclose(spacing(1, full), [999])
    np.testing.assert_allclose(respaced.alphas_cumprod[[0, -1]], full.alphas_cumprod[[0, -1]])


def test_whole_timesteps_are_taken_as_they_are():
    full = sch.linear_schedule()
    between = sch.respace(full, np.array([3.0, 500.0, 999.0]))
    whole = sch.respace(full, np.array([3, 500, 999]))
    np.testing.assert_array_equal(whole.alphas_cumprod, full.alphas_cumprod[[3, 500, 999]])
    np.testing.assert_allclose(between.alphas_cumprod, whole.alphas_cumprod, rtol=1e-12)
