"""What a network predicts: v against ε by hand, flow against recorded numbers of SiT's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import losses, samplers
from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import mdt_names
from tests.published import GOLDEN, dit_state, relative_error

SCHEDULE = sch.linear_schedule(1000)
SHAPE = (4, 3, 3, 2)


@pytest.fixture(scope="module")
def recorded():
    """flow.npz: SiT's transport with a small random SiT, as [N, H, W, C]."""
    numbers = dict(np.load(GOLDEN / "flow.npz"))
    return {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in numbers.items()}


@pytest.fixture(scope="module")
def network(recorded):
    """A function (x, t) of the SiT behind the numbers."""
    model, params = mdt_names.from_published(dit_state("sit"), num_heads=2)
    labels = jnp.asarray(recorded["labels"])
    return jax.jit(lambda x, t: model.apply({"params": params}, x, t, labels))


def test_flow_has_sits_loss_and_velocity(network, recorded):
    data, noise, t = (recorded[name] for name in ("data", "noise", "t"))
    found = losses.flow_losses(network, data, jnp.asarray(t), noise)
    assert list(found) == ["mse"] and relative_error(found["mse"], recorded["loss"]) < 2e-6
    times = t[:, None, None, None]
    velocity = network(times * data + (1 - times) * noise, jnp.asarray(t))[..., :4]
    assert relative_error(velocity, recorded["velocity"]) < 2e-6


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_flow_is_sampled_as_sit_does(name, network, recorded):
    options = SampleOptions(objective="flow", sampler=name, num_steps=10, clip_denoised=False)
    sampler = options.make_sampler()
    start = sampler.start(jnp.asarray(recorded["noise"]))
    end = samplers.sample(network, sampler, options.schedule(), start, lambda k: 0)
    assert relative_error(end.x, recorded[name]) < 2e-6


def test_heun_integrates_what_euler_does_not():
    """dx/dt = 2t, from 0: after any number of steps of order 2, x = 1."""
    network = lambda x, t: jnp.concatenate([jnp.ones_like(x) * 2 * t[:, None, None, None]] * 2, -1)  # noqa: E731
    ends = {}
    for name, make in samplers.FLOW_SAMPLERS.items():
        start = make(0.0).start(jnp.zeros(SHAPE))
        ends[name] = samplers.sample(network, make(0.0), sch.flow_schedule(5), start, lambda k: 0).x
    assert abs(ends["heun"] - 1).max() < 1e-6 and abs(ends["euler"] - 0.8).max() < 1e-6


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_the_predicted_sample_is_clipped(name):
    """A network whose x̂_0 is 3 everywhere draws the limit."""
    options = SampleOptions(objective="flow", sampler=name, num_steps=4, clip_denoised=True)

    def network(x, t):
        left = jnp.maximum(1 - t, 1e-3)[:, None, None, None]
        return jnp.concatenate([(3 - x) / left] * 2, -1)

    start = options.make_sampler().start(jnp.zeros(SHAPE))
    end = samplers.sample(network, options.make_sampler(), options.schedule(), start, lambda k: 0)
    assert abs(end.x0 - 1).max() < 1e-6 and abs(end.x - 1).max() < 1e-6


def draws(seed=0):
    key = jax.random.split(jax.random.key(seed), 3)
    x0, noise = jax.random.normal(key[0], SHAPE), jax.random.normal(key[1], SHAPE)
    return x0, noise, jnp.asarray([0, 10, 500, 999])


def test_v_holds_the_sample_and_the_noise():
    x0, noise, t = draws()
    x, v = sch.q_sample(SCHEDULE, x0, t, noise), sch.v_target(SCHEDULE, x0, t, noise)
    assert relative_error(sch.predict_x0_from_v(SCHEDULE, x, t, v), x0) < 1e-6
    assert relative_error(sch.predict_eps_from_v(SCHEDULE, x, t, v), noise) < 1e-6


def as_v(x, t, eps):
    """v where ε is predicted: (ε − σ·x)/α."""
    alpha = sch.extract(np.sqrt(SCHEDULE.alphas_cumprod), t)
    sigma = sch.extract(np.sqrt(1 - SCHEDULE.alphas_cumprod), t)
    return (eps - sigma * x) / alpha


def of_noise(x, t):
    """A smooth function in place of a network that predicts ε."""
    eps = jnp.tanh(x + t[:, None, None, None] / 1000)
    return jnp.concatenate([eps, jnp.sin(x)], -1)


def of_v(x, t):
    eps, variance = jnp.split(of_noise(x, t), 2, -1)
    return jnp.concatenate([as_v(x, t, eps), variance], -1)


def test_losses_of_v_are_those_of_noise_over_alpha():
    x0, noise, t = draws(1)
    t = jnp.asarray([0, 10, 300, 600])  # later, dividing by √ᾱ loses digits
    eps = losses.diffusion_losses(of_noise, SCHEDULE, x0, t, noise)
    v = losses.diffusion_losses(of_v, SCHEDULE, x0, t, noise, objective="v")
    alphas = SCHEDULE.alphas_cumprod[np.asarray(t)]
    assert np.allclose(v["mse"], eps["mse"] / alphas, rtol=1e-4)
    assert np.allclose(v["vb"], eps["vb"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("clip", [False, True])
def test_samplers_draw_the_same_by_v(name, clip):
    """Steps of 0 to 800, since a step near pure noise amplifies rounding."""
    schedule = sch.respace(SCHEDULE, np.linspace(0, 800, 9).astype(int))
    noise = jax.random.normal(jax.random.key(3), (16, *SHAPE))
    ends = []
    for objective, network in (("epsilon", of_noise), ("v", of_v)):
        options = SampleOptions(sampler=name, objective=objective, clip_denoised=clip)
        sampler = options.make_sampler()
        state = sampler.start(noise[0])
        ends.append(samplers.sample(network, sampler, schedule, state, lambda k: noise[k]).x)
    assert relative_error(ends[1], ends[0]) < 1e-4


def test_min_snr_weighs_the_sample_alike():
    """The weight of x̂_0's squared error is min(SNR, 5), whatever is predicted."""
    t = jnp.asarray([0, 10, 200, 500, 900])
    alphas = SCHEDULE.alphas_cumprod[np.asarray(t)]
    snr = alphas / (1 - alphas)
    for objective, factor in (("epsilon", snr), ("v", 1 + snr)):  # of x̂_0's error to its own
        weights = losses.weights_of_samples("min_snr_5", objective, SCHEDULE, t)
        assert np.allclose(weights * factor, np.minimum(snr, 5), rtol=1e-5)
        uniform = losses.weights_of_samples("uniform", objective, SCHEDULE, t)
        assert (np.asarray(uniform) == 1).all()
    times = np.array([0.0, 0.3, 0.6, 0.9, 1.0])
    weights = losses.weights_of_samples("min_snr_5", "flow", SCHEDULE, jnp.asarray(times))
    with np.errstate(divide="ignore"):
        snr = times**2 / (1 - times) ** 2
    assert np.allclose(weights[:4], (np.minimum(snr, 5) * (1 - times) ** 2)[:4], rtol=1e-5)
    assert weights[4] == 0


def test_samplers_that_do_not_fit_are_refused():
    for objective, sampler in (("flow", "ddpm"), ("epsilon", "euler"), ("v", "euler")):
        with pytest.raises(UserError, match=f"sampler is {sampler}; a network that predicts"):
            SampleOptions(objective=objective, sampler=sampler).check(10)
