import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.guidance import power_cosine
from mdt_jax.diffusion.samplers import FLOW_SAMPLERS, SAMPLERS, sample
from tests.conftest import FULL_COMPILE
from tests.published import (
    MODELS,
    VERSIONS,
    guided_network,
    published_numbers,
    published_params,
    relative_error,
)


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

        guided = guided_network(network, y, 10, lambda t: power_cosine(t, 3.8, 4.0))
        return sample(guided, sampler, schedule, sampler.start(z), lambda k: noise[k]).x

    out = run(jnp.asarray(golden["sample_z"]), jnp.asarray(golden["sample_y"]))
    assert relative_error(out, golden[f"sample_{name}"]) < 2e-6


MU, DEVIATION = 0.5, 0.3
FULL = sch.linear_schedule()


def of_a_gaussian(x, t):
    """The exact noise predictor of x0 ~ N(MU, DEVIATION²), with the posterior's variance."""
    half_log_snr = jnp.asarray(FULL.half_log_snr, jnp.float32)
    at = jnp.interp(t.astype(jnp.float32), jnp.arange(1000.0), half_log_snr)
    a = jax.nn.sigmoid(2 * at)[:, None, None, None]
    eps = jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MU) / (a * DEVIATION**2 + 1 - a)
    return jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)


def run(sampler, num_steps, z, spacing="even", network=of_a_gaussian):
    schedule = sch.respace(FULL, sch.SPACINGS[spacing](num_steps, FULL))

    def noise(k):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), k), z.shape)

    def whole(z):
        return sample(network, sampler, schedule, sampler.start(z), noise).x

    return np.asarray(jax.jit(whole)(z), np.float64)


@pytest.mark.parametrize("spacing", ["even", "log_snr", "karras"])
@pytest.mark.parametrize(
    "name, eta",
    [("ddpm", 0), ("ddim", 0), ("ddim", 1), ("dpmpp_2m", 0), ("dpmpp_2m_sde", 0), ("heun", 0)],
)
def test_a_gaussian_is_recovered(name, eta, spacing):
    """With the exact noise predictor, samples have the data's mean and deviation."""
    z = jax.random.normal(jax.random.key(0), (1, 200, 200, 1))
    out = run(SAMPLERS[name](eta), 250, z, spacing)
    assert np.mean(out) == pytest.approx(MU, abs=0.01)
    assert np.std(out) == pytest.approx(DEVIATION, rel=0.05)


def exact(z):
    """Where the probability-flow ODE leads from z, and the jump from its end to the clean sample.

    x(t) − √ᾱ·MU grows in proportion to its deviation, √(ᾱ·DEVIATION² + 1 − ᾱ).
    """
    z, (first, last) = np.asarray(z, np.float64), FULL.alphas_cumprod[[-1, 0]]
    of = {a: np.sqrt(a * DEVIATION**2 + 1 - a) for a in (first, last)}
    gap = (z - np.sqrt(first) * MU) * of[last] / of[first]
    return MU + np.sqrt(last) * DEVIATION**2 / of[last] ** 2 * gap


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_order_of_convergence(name, order, spacing):
    """Half the step makes the error 2^order times smaller."""
    z = jnp.linspace(-3, 3, 64).reshape(1, 8, 8, 1)
    errors = [
        np.abs(run(SAMPLERS[name](0.0), n, z, spacing) - exact(z)).max() for n in (20, 40, 80, 160)
    ]
    measured = np.log2(np.divide(errors[:-1], errors[1:]))
    assert order - 0.1 < measured.min() and measured.max() < order + 0.25, measured
    assert measured[-1] == pytest.approx(order, abs=0.1)


def test_the_first_evaluation_is_at_the_noise_and_the_last_one_gives_the_sample():
    """All samplers begin at t = 999 and end with what the network takes the sample for."""
    z = jnp.linspace(-3, 3, 64).reshape(1, 8, 8, 1)
    for name, make in SAMPLERS.items():
        seen = []

        def network(x, t, seen=seen):
            jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
            return of_a_gaussian(x, t)

        sampler = make(0.0)
        schedule = sch.respace(FULL, sch.spaced_timesteps(5, 1000))
        run_all = jax.jit(
            lambda z, s=sampler, n=network, c=schedule: sample(
                n, s, c, s.start(z), lambda k: jnp.zeros_like(z)
            )
        )
        state = run_all(z)
        jax.effects_barrier()
        every = [999, 749, 500, 250, 0]
        twice = [999, *(t for t in every[1:] for _ in range(2))]
        assert seen == (twice if name == "heun" else every), name
        np.testing.assert_allclose(state.x, state.x0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_one_step_of_ddim(eta):
    """Equations 12 and 16 in float64 NumPy."""
    schedule = sch.respace(FULL, sch.spaced_timesteps(10, 1000))
    random = np.random.RandomState(0)
    x, eps, noise = random.normal(size=(3, 1, 4, 4, 2))
    out = np.concatenate([eps, eps], axis=-1).astype(np.float32)
    sampler, i = SAMPLERS["ddim"](eta), 6
    state = sampler.start(jnp.asarray(x, jnp.float32))
    got = sampler.step(schedule, state, jnp.asarray(out), 9 - i, jnp.asarray(noise, jnp.float32)).x
    a, b = schedule.alphas_cumprod[i], schedule.alphas_cumprod[i - 1]
    s = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
    x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    expected = np.sqrt(b) * x0 + np.sqrt(1 - b - s**2) * eps + s * noise
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("i", [8, 5, 1, 0])
def test_one_step_of_dpm_solver(name, i):
    """The integrals over λ themselves, by quadrature in float64: D is linear in λ.

    x' = (σ'/σ)x + σ'∫e^λ·D dλ, and with noise x' = (σ'/σ)e^−h·x + 2σ'∫e^−(λ'−λ)·e^λ·D dλ + …; D in
    the first-order correction is taken at the middle of the step, as the papers do.
    """
    schedule = sch.respace(FULL, sch.SPACINGS["log_snr"](10, FULL))
    random = np.random.RandomState(i)
    x, eps, before, noise = random.normal(size=(4, 1, 4, 4, 2))
    out = np.concatenate([eps, eps], axis=-1).astype(np.float32)
    sampler = SAMPLERS[name](0.0)
    state = sampler.start(jnp.asarray(x, jnp.float32))._replace(x0=jnp.asarray(before, jnp.float32))
    got = sampler.step(schedule, state, jnp.asarray(out), 9 - i, jnp.asarray(noise, jnp.float32)).x
    a = np.sqrt(schedule.alphas_cumprod)
    s = np.sqrt(1 - schedule.alphas_cumprod)
    x0 = (x - s[i] * eps) / a[i]
    if i == 0:
        np.testing.assert_allclose(got, x0, rtol=1e-4, atol=1e-4)
        return
    half = schedule.half_log_snr
    h, h_before = half[i - 1] - half[i], half[i] - half[i + 1]
    middle = x0 + (x0 - before) / h_before * h / 2
    grid = np.linspace(half[i], half[i - 1], 20001)
    if name == "dpmpp_2m":
        integral = np.trapezoid(np.exp(grid), grid)
        expected = s[i - 1] / s[i] * x + s[i - 1] * integral * middle
    else:
        integral = 2 * np.trapezoid(np.exp(2 * grid), grid) * np.exp(-half[i - 1])
        expected = s[i - 1] / s[i] * np.exp(-h) * x + s[i - 1] * integral * middle
        expected += s[i - 1] * np.sqrt(1 - np.exp(-2 * h)) * noise
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


def test_pieces_are_the_whole():
    z, sampler = jnp.linspace(-3, 3, 16).reshape(1, 4, 4, 1), SAMPLERS["heun"](0.0)
    schedule = sch.respace(FULL, sch.spaced_timesteps(6, 1000))

    def noise(k):
        return jnp.zeros_like(z)

    part = jax.jit(
        lambda state, start, count: sample(
            of_a_gaussian, sampler, schedule, state, noise, start, count
        ),
        static_argnums=2,
    )
    state = part(part(sampler.start(z), 0, 4), 4, 7)
    whole = sample(of_a_gaussian, sampler, schedule, sampler.start(z), noise)
    np.testing.assert_allclose(state.x, whole.x, atol=1e-6)


def clipping(name, eta=0.0, limit=1.0):
    return dataclasses.replace(SAMPLERS[name](eta), limit=limit)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clipping_keeps_each_prediction_within_the_limit(name):
    """Of data far outside, of guided networks too, which are clipped after they are guided."""
    z = jnp.linspace(-3, 3, 64).reshape(1, 8, 8, 1)
    schedule = sch.respace(FULL, sch.SPACINGS["log_snr"](6, FULL))

    def network(x, t, y):  # x̂_0 = 2·x/√ᾱ for class 0, and less for the null label
        a = 1 / (1 + jnp.exp(-2 * jnp.interp(t, schedule.timesteps, schedule.half_log_snr)))
        a, factor = a[:, None, None, None], jnp.where(y == 0, 2.0, 0.1)[:, None, None, None]
        eps = (1 - factor) * x / jnp.sqrt(1 - a)
        return jnp.concatenate([eps, jnp.zeros_like(eps)], axis=-1)

    guided = guided_network(
        network, jnp.zeros(1, jnp.int32), 1, lambda t: power_cosine(t, 3.0, 1.0)
    )

    def draw(k):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), k), z.shape)

    def predictions(sampler):
        state, seen = sampler.start(z), []
        one = jax.jit(lambda state, k: sample(guided, sampler, schedule, state, draw, k, 1))
        for k in range(len(sampler.indices(6))):
            state = one(state, k)
            seen.append(np.asarray(state.x0))
        return np.stack(seen), np.asarray(state.x)

    free, _ = predictions(SAMPLERS[name](0.0))
    clipped, last = predictions(clipping(name))
    assert (np.abs(free).reshape(len(free), -1).max(1) > 1.5).all()
    assert (np.abs(clipped).reshape(len(free), -1).max(1) == 1).all()
    np.testing.assert_allclose(last, clipped[-1], atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_limit_that_is_never_reached_changes_nothing(name):
    z = jnp.linspace(-3, 3, 64).reshape(1, 8, 8, 1)
    free, clipped = (run(clipping(name, limit=limit), 20, z) for limit in (None, 50.0))
    np.testing.assert_allclose(free, clipped, atol=1e-5)


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_one_clipped_step_is_the_published_one(name, eta):
    """`clip_denoised` of the published code in float64 NumPy: x̂_0 first, then ε, if any, of it."""
    schedule = sch.respace(FULL, sch.spaced_timesteps(10, 1000))
    random = np.random.RandomState(0)
    x, eps, v, noise = random.normal(size=(4, 1, 4, 4, 2))
    out = np.concatenate([eps, v], axis=-1).astype(np.float32)
    sampler, i = clipping(name, eta), 6
    state = sampler.start(jnp.asarray(x, jnp.float32))
    got = sampler.step(schedule, state, jnp.asarray(out), 9 - i, jnp.asarray(noise, jnp.float32)).x
    a, b = schedule.alphas_cumprod[i], schedule.alphas_cumprod[i - 1]
    x0 = np.clip((x - np.sqrt(1 - a) * eps) / np.sqrt(a), -1, 1)
    assert (np.abs(x0) == 1).any() and (np.abs(x0) < 1).any()
    beta = 1 - a / b
    if name == "ddpm":
        mean = np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(1 - beta) * (1 - b) / (1 - a) * x
        low, high = np.log(beta * (1 - b) / (1 - a)), np.log(beta)
        expected = mean + np.exp((low + (v + 1) / 2 * (high - low)) / 2) * noise
    else:
        eps = (x / np.sqrt(a) - x0) / np.sqrt(1 / a - 1)
        s = eta * np.sqrt((1 - b) / (1 - a) * beta)
        expected = np.sqrt(b) * x0 + np.sqrt(1 - b - s**2) * eps + s * noise
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def of_a_flow(x, t):
    """The velocity E[x_0 − noise | x_t] of Gaussian data, x_t = t·x_0 + (1 − t)·noise."""
    t = t[:, None, None, None]
    variance = (t * DEVIATION) ** 2 + (1 - t) ** 2
    v = MU + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MU)
    return jnp.concatenate([v, jnp.zeros_like(v)], axis=-1)


def test_euler_of_a_flow_is_of_order_one():
    """The flow takes z to MU + DEVIATION·z."""
    z = jnp.linspace(-3, 3, 64, dtype=jnp.float32).reshape(1, 8, 8, 1)
    errors = []
    for steps in (20, 40, 80, 160):
        seen, sampler, schedule = [], FLOW_SAMPLERS["euler"](0.0), sch.flow_schedule(steps)

        def network(x, t, seen=seen):
            jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
            return of_a_flow(x, t)

        out = sample(network, sampler, schedule, sampler.start(z), lambda k: z * 0)
        jax.effects_barrier()
        np.testing.assert_allclose(seen, np.arange(steps) / steps, rtol=1e-6)
        np.testing.assert_allclose(out.x, out.x0, atol=1e-5)  # the last step ends at x̂_0
        errors.append(np.abs(np.asarray(out.x) - (MU + DEVIATION * np.asarray(z))).max())
    measured = np.log2(np.divide(errors[:-1], errors[1:]))
    assert measured[-1] == pytest.approx(1, abs=0.1), measured


def test_a_flow_is_clipped_where_it_leaves_the_limit():
    z = jnp.linspace(-3, 3, 64).reshape(1, 8, 8, 1)
    schedule = sch.flow_schedule(10)

    def run(limit):
        sampler = dataclasses.replace(FLOW_SAMPLERS["euler"](0.0), limit=limit)
        return sample(of_a_flow, sampler, schedule, sampler.start(z), lambda k: z * 0).x

    free = np.asarray(run(None))
    np.testing.assert_array_equal(run(50.0), free)
    assert np.abs(free).max() > 0.5 and np.abs(run(0.5)).max() == pytest.approx(0.5)
