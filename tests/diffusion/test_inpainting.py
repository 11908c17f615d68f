import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.inpainting import Known, RePaint, resampling_walk
from mdt_jax.diffusion.samplers import SAMPLERS


def test_the_walk_without_jumps():
    assert resampling_walk(4, 10, 5).tolist() == [3, 2, 1, 0, -1]
    assert resampling_walk(4, 2, 1).tolist() == [3, 2, 1, 0, -1]


def test_the_walk_goes_back_up():
    """Five steps, jumps of two, each stretch passed twice: from 2 to 4, from 0 to 2."""
    assert resampling_walk(5, 2, 2).tolist() == [4, 3, 4, 3, 2, 1, 2, 1, 0, -1]


def test_the_walk_of_the_paper_has_its_length():
    """250 steps, j = 10, r = 10: 24 jumps, each 9 times back by 10."""
    walk = resampling_walk(250, 10, 10)
    assert len(walk) - 1 == 250 + 24 * 9 * 10
    steps = np.diff(walk)
    assert set(steps.tolist()) == {-1, 9} and (steps == 9).sum() == 24 * 9


@pytest.mark.parametrize("name, short", [("ddpm", 0.08), ("ddim", 0.12)])
def test_a_gaussian_is_completed_by_its_conditional(name, short):
    """Two correlated pixels, one known: the other's mean and deviation are the conditional's.

    Nearly: RePaint is not exact. Without going back the mean falls short by more.
    """
    rho, known_value = 0.9, 1.0
    schedule = sch.respace(sch.linear_schedule(), sch.spaced_timesteps(100, 1000))
    abar = jnp.asarray(sch.linear_schedule().alphas_cumprod, jnp.float32)
    covariance = jnp.array([[1.0, rho], [rho, 1.0]])

    def network(x, t):
        a = abar[t][0]
        precision = jnp.linalg.inv(a * covariance + (1 - a) * jnp.eye(2))
        eps = jnp.sqrt(1 - a) * x[:, 0, :, 0] @ precision
        eps = eps[:, None, :, None]
        return jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)

    count = 4000
    x = jax.random.normal(jax.random.key(0), (count, 1, 2, 1))
    known = jnp.full_like(x, known_value)
    hidden = jnp.array([False, True])[None, None, :, None]

    def noise(k):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), k), x.shape)

    def run(resamples, known):
        walk = resampling_walk(100, 10, resamples)
        sampler, count = SAMPLERS[name](0.0), len(walk) - 1

        def whole(x, known):
            return RePaint(sampler, schedule, walk).sample(
                network, x, Known(known, hidden), noise, 0, count
            )

        return np.asarray(jax.jit(whole)(x, known))[:, 0, 1, 0]

    drawn, mean = run(8, known), rho * known_value
    assert run(1, known).mean() < 0.85 * mean
    assert mean - short < drawn.mean() < mean + 0.05
    assert drawn.std() == pytest.approx(np.sqrt(1 - rho**2), rel=0.25)
    # What is hidden of `known` is not looked at.
    np.testing.assert_array_equal(run(8, known.at[:, :, 1].set(5.0)), drawn)


@pytest.mark.parametrize("after", [5, 9])
def test_one_turn(after):
    """What the network sees, and where x is then, in float64 NumPy; to 5 without a jump, to 9."""
    schedule = sch.respace(sch.linear_schedule(), sch.spaced_timesteps(12, 1000))
    random = np.random.RandomState(after)
    x, known, eps = random.normal(size=(3, 1, 4, 4, 1))
    draws = random.normal(size=(3, 1, 4, 4, 1))
    hidden = np.zeros((1, 4, 4, 1), bool)
    hidden[:, 1:3] = True
    seen, sampler = [], SAMPLERS["ddim"](0.5)

    def network(x, t):
        seen.append((np.asarray(x), np.asarray(t)))
        return jnp.asarray(np.concatenate([eps, eps], -1), jnp.float32)

    with jax.disable_jit():
        out = RePaint(sampler, schedule, np.array([6, after, -1])).sample(
            network, jnp.asarray(x, jnp.float32),
            Known(jnp.asarray(known, jnp.float32), jnp.asarray(hidden)),
            lambda k: jnp.asarray(draws, jnp.float32)[k], 0, 1,
        )  # fmt: skip
    abar = schedule.alphas_cumprod
    noised = np.sqrt(abar[6]) * known + np.sqrt(1 - abar[6]) * draws[0]
    given = np.where(hidden, x, noised)
    ((saw, t),) = seen
    np.testing.assert_allclose(saw, given, atol=1e-5)
    assert t == [schedule.timesteps[6]]
    s = 0.5 * np.sqrt((1 - abar[5]) / (1 - abar[6]) * (1 - abar[6] / abar[5]))
    x0 = (given - np.sqrt(1 - abar[6]) * eps) / np.sqrt(abar[6])
    expected = np.sqrt(abar[5]) * x0 + np.sqrt(1 - abar[5] - s**2) * eps + s * draws[1]
    if after == 9:
        left = abar[9] / abar[5]
        expected = np.sqrt(left) * expected + np.sqrt(1 - left) * draws[2]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
