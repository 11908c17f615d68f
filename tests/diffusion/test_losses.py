import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from mdt_jax.diffusion import losses
from mdt_jax.diffusion.schedule import linear_schedule
from mdt_jax.models import masking
from tests.conftest import FULL_COMPILE
from tests.published import MODELS, VERSIONS, published_numbers, published_params, relative_error


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["full", "masked"])
def test_losses_are_the_published_ones(name, version):
    golden, params = published_numbers(version), published_params(f"{version}_state")
    y, length = golden["loss_y"], int(golden["mask_len_keep"])
    keep = None
    if name == "masked":
        keep = masking.keep_ids(jnp.asarray(golden["mask_noise"]), length)

    @functools.partial(jax.jit, compiler_options=FULL_COMPILE)
    def compute(x0, t, noise):
        def network(x, t):
            return MODELS[version].apply({"params": params}, x, t, y, keep)

        return losses.diffusion_losses(network, linear_schedule(), x0, t, noise)

    inputs = [jnp.asarray(golden[f"loss_{part}"]) for part in ("x0", "t", f"noise_{name}")]
    got = compute(*inputs)
    weight = losses.uniform_weights if version == "v1" else losses.min_snr_weights
    mse = got["mse"] * weight(linear_schedule())[golden["loss_t"]]
    assert relative_error(mse, golden[f"loss_{name}_mse"]) < 2e-6
    assert relative_error(got["vb"], golden[f"loss_{name}_vb"]) < 1e-4
    assert relative_error(mse + got["vb"], golden[f"loss_{name}_loss"]) < 1e-4


def test_min_snr_weights():
    """Against the figures of the published schedule."""
    weights = losses.min_snr_weights(linear_schedule())
    assert np.round(weights[[0, 50, 100]], 4).tolist() == [0.0005, 0.1549, 0.5857]
    assert np.all(weights[130:] == 1) and round(weights.mean(), 4) == 0.9131


def test_a_mean_over_some_pixels():
    x = jnp.arange(2 * 2 * 2 * 3.0).reshape(2, 2, 2, 3)
    where = jnp.array([[[1, 0], [0, 0]], [[0, 1], [1, 1]]], bool)[..., None]
    expected = [np.asarray(x[0, 0, 0]).mean(), np.asarray(x[1]).reshape(4, 3)[1:].mean()]
    np.testing.assert_allclose(losses.mean_per_sample(x, where), expected, rtol=1e-6)


def test_variational_term_trains_only_the_variance():
    x0 = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    noise = jax.random.normal(jax.random.key(1), x0.shape)

    def vb(out):
        t = jnp.array([0, 500])
        return losses.diffusion_losses(lambda x, t: out, linear_schedule(), x0, t, noise)[
            "vb"
        ].sum()

    gradient = jax.grad(vb)(0.1 * jax.random.normal(jax.random.key(2), (2, 4, 4, 2)))
    assert np.all(gradient[..., 0] == 0) and np.all(gradient[..., 1] != 0)


def test_kl_of_gaussians():
    one, two = losses.normal_kl(jnp.array([0.3, 1.0]), 0.0, jnp.array([0.3, 3.0]), 0.0)
    assert one == 0 and two == pytest.approx(2.0)


def test_discretized_likelihood_is_the_mass_of_a_bin():
    x, mean, std = np.array([-1.0, -0.2, 0.5, 1.0]), np.array([-0.9, 0.0, 0.4, 0.8]), 0.3
    low = np.where(x <= -1, -np.inf, x - 1 / 255)
    high = np.where(x >= 1, np.inf, x + 1 / 255)
    expected = np.log(norm.cdf(high, mean, std) - norm.cdf(low, mean, std))
    got = losses.discretized_gaussian_log_likelihood(x, mean, jnp.log(std))
    np.testing.assert_allclose(got, expected, rtol=5e-3)  # the tanh approximation of the CDF
