import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.guidance import guide, power_cosine
from mdt_jax.diffusion.samplers import SAMPLERS, sample
from tests.conftest import FULL_COMPILE
from tests.published import MODELS, VERSIONS, published_numbers, published_params, relative_error


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_guided_sampling_is_the_published_one(name, version):
    golden, params = published_numbers(version), published_params(f"{version}_state")
    schedule = sch.respace(sch.linear_schedule(), sch.spaced_timesteps(10, 1000))
    np.testing.assert_array_equal(schedule.timesteps, golden["sample_timesteps"])
    noise = jnp.asarray(golden["sample_noise"][:, :3])

    sampler = SAMPLERS[name](0.0)

    @functools.partial(jax.jit, compiler_options=FULL_COMPILE)
    def run(z, y):
        def network(x, t, y):
            return MODELS[version].apply({"params": params}, x, t, y)

        guided = guide(network, y, 10, lambda t: power_cosine(t, 3.8, 4.0))
        return sample(guided, sampler, schedule, sampler.start(z), lambda k: noise[k]).x

    out = run(jnp.asarray(golden["sample_z"]), jnp.asarray(golden["sample_y"]))
    assert relative_error(out, golden[f"sample_{name}"]) < 2e-6


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_gaussian_is_recovered(name):
    """With the exact noise predictor of x0 ~ N(μ, s²), samples have that mean and deviation."""
    mu, s = 0.5, 0.3
    schedule = sch.respace(sch.linear_schedule(), sch.spaced_timesteps(250, 1000))
    abar = jnp.asarray(sch.linear_schedule().alphas_cumprod, jnp.float32)

    def network(x, t):
        a = abar[t][:, None, None, None]
        eps = jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mu) / (a * s**2 + 1 - a)
        return jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)  # the posterior's variance

    z = jax.random.normal(jax.random.key(0), (1, 200, 200, 1))

    def noise(k):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), k), z.shape)

    out = jax.jit(lambda z: sample(network, SAMPLERS[name], schedule, z, noise))(z)
    assert np.mean(out) == pytest.approx(mu, abs=0.01)
    assert np.std(out) == pytest.approx(s, rel=0.05)
