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
from tests.published import V1_MODEL, relative_error, v1_numbers, v1_params

GOLDEN = v1_numbers()


@pytest.mark.parametrize("name", ["full", "masked"])
def test_losses_are_the_published_ones(name):
    params, y = v1_params(), GOLDEN["loss_y"]
    keep = masking.keep_ids(jnp.asarray(GOLDEN["mask_noise"]), 44) if name == "masked" else None

    @functools.partial(jax.jit, compiler_options=FULL_COMPILE)
    def compute(x0, t, noise):
        def network(x, t):
            return V1_MODEL.apply({"params": params}, x, t, y, keep)

        return losses.diffusion_losses(network, linear_schedule(), x0, t, noise)

    inputs = [jnp.asarray(GOLDEN[f"loss_{part}"]) for part in ("x0", "t", f"noise_{name}")]
    got = compute(*inputs)
    assert relative_error(got["mse"], GOLDEN[f"loss_{name}_mse"]) < 2e-6
    assert relative_error(got["vb"], GOLDEN[f"loss_{name}_vb"]) < 1e-4
    assert relative_error(got["mse"] + got["vb"], GOLDEN[f"loss_{name}_loss"]) < 1e-4


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
