import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.train.optimizers import ema_schedule, make_optimizer, rate_schedule, scale_by_adan

# Five gradients of two parameters; the steps below are worked out in float64.
GRADIENTS = np.random.default_rng(0).normal(size=(5, 2))


def adan_by_hand(gradients, b1=0.98, b2=0.92, b3=0.99, eps=1e-8):
    """Each step's direction, written out as in the published optimiser."""
    m = v = n = np.zeros(2)
    before, steps = gradients[0], []
    for k, g in enumerate(gradients, start=1):
        d, before = g - before, g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d
        n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
        steps.append(
            (m / (1 - b1**k) + b2 * v / (1 - b2**k)) / (np.sqrt(n) / np.sqrt(1 - b3**k) + eps)
        )
    return np.array(steps)


def directions(transformation):
    state, steps = transformation.init(jnp.zeros(2)), []
    for gradient in GRADIENTS:
        step, state = transformation.update(jnp.asarray(gradient, jnp.float32), state)
        steps.append(step)
    return np.array(steps)


def test_adan_is_the_published_one_and_optax_is_not():
    expected = adan_by_hand(GRADIENTS)
    np.testing.assert_allclose(directions(scale_by_adan()), expected, rtol=1e-5)
    assert np.abs(directions(optax.scale_by_adan()) / expected - 1).max() > 0.1


def test_adans_first_step_is_the_gradients_sign():
    first = directions(scale_by_adan())[0]
    np.testing.assert_allclose(first, np.sign(GRADIENTS[0]), rtol=1e-6)
    assert first == pytest.approx(adan_by_hand(GRADIENTS[:1])[0])


def optim(**changes):
    fields = configs.default().optim
    fields.update(changes)
    return fields


STEPS, LR, END = 40, 3e-3, 2e-4
OF_OPTAX = {
    ("constant", 0): optax.constant_schedule(LR),
    ("constant", 8): optax.warmup_constant_schedule(0.0, LR, 8),
    ("cosine", 0): optax.cosine_decay_schedule(LR, STEPS, END / LR),
    ("cosine", 8): optax.warmup_cosine_decay_schedule(0.0, LR, 8, STEPS, END),
    ("linear", 0): optax.linear_schedule(LR, END, STEPS),
    ("linear", 8): lambda step: np.interp(step, [0, 8, STEPS], [0, LR, END]),
}


@pytest.mark.parametrize("name, warmup", OF_OPTAX)
def test_schedules_are_optaxs(name, warmup):
    end = {} if name == "constant" else {"end_lr": END}
    factor = rate_schedule(optim(lr=LR, schedule=name, warmup_steps=warmup, **end), STEPS)
    steps = range(STEPS + 1)
    ours = [LR * float(factor(jnp.int32(step))) for step in steps]
    theirs = [float(OF_OPTAX[name, warmup](step)) for step in steps]
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-9)
    assert ours[warmup] == pytest.approx(LR) and (ours[0] == 0) == bool(warmup)
    assert ours[-1] == pytest.approx(LR if name == "constant" else END)


def parameters():
    """A kernel, and what does not decay."""
    rows = np.linspace(-1, 2, 6).reshape(2, 3)
    return {
        "linear": {"kernel": rows, "bias": rows[0]},
        "table": {"embedding": rows},
        "relative_bias": rows,
        "mask_token": rows[1],
    }


def adamw_by_hand(parameters, gradients, rate, b1, b2, decay):
    """Loshchilov & Hutter 2019, algorithm 2, with the schedule multiplier 1, in float64."""
    p, m, v = parameters, 0.0, 0.0
    for k, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**k)) / (np.sqrt(v / (1 - b2**k)) + 1e-8)
        p = p - rate * (step + decay * p)
    return p


@pytest.mark.parametrize("betas", [{}, {"b1": 0.5, "b2": 0.0}])
def test_adamw_with_decay_is_computed_by_hand(betas):
    rate, decay = 0.1, 0.3
    optimizer = make_optimizer(optim(weight_decay=decay, **betas))
    params = jax.tree.map(jnp.float32, parameters())
    random, state = np.random.default_rng(1), optimizer.init(params)
    gradients = [jax.tree.map(lambda p: random.normal(size=p.shape), params) for _ in range(3)]
    for each in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, each), state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    b1, b2 = betas.get("b1", 0.9), betas.get("b2", 0.999)

    def expected(path, parameter, *gradients):
        kernel = path[-1].key == "kernel"
        return adamw_by_hand(parameter, gradients, rate, b1, b2, decay if kernel else 0.0)

    by_hand = jax.tree.map_with_path(expected, parameters(), *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, by_hand)
    assert np.abs(by_hand["linear"]["kernel"] - by_hand["table"]["embedding"]).max() > 0.01


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_only_kernels_of_a_network_decay(name):
    """With a gradient of 0 the decay is all that changes a parameter."""
    model = MDT(
        input_size=(8, 8), in_channels=1, hidden_size=16, depth=4, num_heads=2, version="v2"
    )
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    optimizer = make_optimizer(optim(name=name, weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    kernels = 0
    for (path, update), parameter in zip(
        jax.tree.leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        decays = path[-1].key == "kernel"
        kernels += decays
        np.testing.assert_array_equal(update, -0.5 * parameter if decays else 0 * parameter)
    assert 20 < kernels < len(jax.tree.leaves(params)) / 2


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_a_resumed_run_may_change_decay_betas_and_clipping(name):
    params = jax.tree.map(jnp.float32, parameters())
    changed = dict(weight_decay=0.1, b1=0.8, b2=0.9, clip_norm=1.0)
    states = [make_optimizer(optim(name=name, **each)).init(params) for each in ({}, changed)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_adan_takes_the_first_two_decay_rates():
    params = {"kernel": jnp.zeros(2)}
    optimizer = make_optimizer(optim(name="adan", b1=0.9, b2=0.5))
    state, steps = optimizer.init(params), []
    for gradient in GRADIENTS:
        updates, state = optimizer.update({"kernel": jnp.float32(gradient)}, state, params)
        steps.append(-updates["kernel"])
    np.testing.assert_allclose(steps, adan_by_hand(GRADIENTS, b1=0.9, b2=0.5), rtol=1e-5)


def test_the_average_of_a_short_run_forgets_its_start():
    assert ema_schedule(optim(ema_decay=0.99)) == 0.99
    decay = ema_schedule(optim(ema_decay=0.99, ema_warmup=True))
    steps = [0, 1, 90, 890, 891, 5000]
    expected = [0.1, 2 / 11, 0.91, 891 / 900, 0.99, 0.99]
    np.testing.assert_allclose([decay(jnp.int32(step)) for step in steps], expected, rtol=1e-6)
    weight = np.prod([float(decay(step)) for step in range(500)])
    assert weight < 1e-12  # of the initial parameters; 0.95 with the published decay of 0.9999
