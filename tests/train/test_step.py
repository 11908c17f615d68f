import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import parallel
from mdt_jax.train.costs import inner_jaxprs
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state, init_state, state_from_params
from mdt_jax.train.step import Objective, draw_step, make_train_step, trace_step
from tests.conftest import FULL_COMPILE
from tests.published import (
    MODELS,
    OBJECTIVES,
    VERSIONS,
    published_numbers,
    published_params,
    published_step,
    relative_error,
)
from tests.train.common import training_loss

MODEL = MDT(input_size=(8, 8), in_channels=1, hidden_size=16, depth=3, num_heads=2, num_classes=10)


def optimizer(**changes):
    optim = configs.default().optim
    with optim.unlocked():
        optim.update(changes)
    return make_optimizer(optim)


def small_state(**changes):
    return init_state(MODEL, optimizer(**changes), jax.random.key(0))


def small_batch(size=8):
    latents = jax.random.uniform(jax.random.key(5), (size, 8, 8, 1), minval=-1)
    return {"latents": latents, "labels": jnp.arange(size) % 10}


def plain_losses(params, batch, draws):
    return training_loss(MODEL, Objective(), params, batch, draws)


losses = jax.jit(plain_losses)
gradient = jax.jit(jax.grad(plain_losses, has_aux=True))


@functools.cache
def small_step(lr, **changes):
    step = jax.jit(make_train_step(MODEL, Objective(), optimizer(**changes), 0.9))
    return lambda state, batch, draws: step(state, batch, draws, jnp.float32(lr))


@pytest.mark.parametrize("version", VERSIONS)
def test_five_steps_are_the_published_ones(version):
    golden, initial = published_numbers(version), published_params(f"{version}_state")
    recipe = {} if version == "v1" else dict(name="adan", clip_norm=1.0)
    optimizer_, rate = optimizer(**recipe), jnp.float32(golden["train_lr"])
    state = state_from_params(jax.tree.map(jnp.asarray, initial), optimizer_)
    decay = float(golden["train_ema_rate"])
    train_step = make_train_step(MODELS[version], OBJECTIVES[version], optimizer_, decay)
    step = jax.jit(train_step, compiler_options=FULL_COMPILE)
    mse = "mse" if version == "v1" else "weighted_mse"
    names = ("loss", f"{mse}/full", "vb/full", f"{mse}/masked", "vb/masked")
    for i in range(5):
        state, metrics = step(state, *published_step(version, i), rate)
        got = np.array([metrics[name] for name in names])
        np.testing.assert_allclose(got, golden["train_losses"][i], rtol=2e-6)
    for got, name in ((state.params, "params_after"), (state.ema, "ema_after")):
        moved, expected = (
            jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), tree, initial)
            for tree in (got, published_params(f"{version}_{name}"))
        )
        assert relative_error(moved, expected) < 1e-4
    assert step._cache_size() == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_first_gradient_is_the_published_one(version):
    batch, draws = published_step(version, 0)

    def loss(params):
        return training_loss(MODELS[version], OBJECTIVES[version], params, batch, draws)[0]

    params = published_params(f"{version}_state")
    gradient = jax.jit(jax.grad(loss), compiler_options=FULL_COMPILE)(params)
    assert relative_error(gradient, published_params(f"{version}_grad_step0")) < 2e-6


def test_draws_depend_on_the_step_alone_and_differ_everywhere():
    key = jax.random.key(0)
    one, again, two = (draw_step(key, jnp.int32(s), MODEL, 64, 1000) for s in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.t, two.t)
    for noise in (one.noise_full, one.noise_masked, one.mask_noise):
        assert len(np.unique(np.asarray(noise).reshape(64, -1)[:, 0])) == 64
    assert not np.array_equal(one.noise_full, one.noise_masked)
    assert not np.array_equal(one.drop_full, one.drop_masked)


def test_timesteps_cover_the_whole_range_and_labels_drop_one_in_ten():
    draws = draw_step(jax.random.key(0), jnp.int32(0), MODEL, 20_000, 1000)
    assert draws.t.min() == 0 and draws.t.max() == 999
    for drop in (draws.drop_full, draws.drop_masked):
        assert np.mean(drop) == pytest.approx(0.1, abs=0.01)


def test_dropped_labels_are_the_null_label():
    state, batch = small_state(), small_batch()
    params = jax.tree.map(lambda a: a + 0.05, state.params)
    draws = draw_step(jax.random.key(0), jnp.int32(0), MODEL, 8, 1000)
    draws = draws._replace(drop_full=jnp.ones(8, bool), drop_masked=jnp.zeros(8, bool))
    null = {**batch, "labels": jnp.full(8, 10)}

    given, nulled = losses(params, batch, draws)[1], losses(params, null, draws)[1]
    assert given["loss/full"] == nulled["loss/full"]
    assert given["loss/masked"] != nulled["loss/masked"]


def test_quartiles_average_to_the_whole():
    draws = draw_step(jax.random.key(0), jnp.int32(0), MODEL, 8, 1000)
    draws = draws._replace(t=jnp.array([0, 249, 250, 499, 500, 749, 750, 999]))
    _, metrics = losses(small_state().params, small_batch(), draws)
    for name in ("mse/full", "vb/full", "mse/masked", "vb/masked"):
        quartiles = [metrics[f"{name}/q{q}"] for q in (1, 2, 3, 4)]
        assert np.mean(quartiles) == pytest.approx(float(metrics[name]), rel=1e-5)


def test_gradient_norm_is_the_norm():
    state, batch = small_state(), small_batch()
    draws = draw_step(jax.random.key(0), state.step, MODEL, 8, 1000)
    leaves = jax.tree.leaves(gradient(state.params, batch, draws)[0])
    expected = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))
    _, metrics = small_step(lr=0.01)(state, batch, draws)
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_ema_and_clipping():
    state, batch = small_state(), small_batch()
    draws = draw_step(jax.random.key(0), state.step, MODEL, 8, 1000)
    after, _ = small_step(lr=0.01)(state, batch, draws)
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.params, after.params)
    assert relative_error(after.ema, expected) < 1e-6

    # AdamW divides out the size of a gradient, except against eps.
    options = dict(lr=0.01, clip_norm=1e-9)
    state = small_state(**options)
    clipped, metrics = small_step(**options)(state, batch, draws)
    assert metrics["grad_norm"] > 1e-3
    moved = jax.tree.map(lambda a, b: a - b, clipped.params, state.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(moved)) < 0.01 * 0.2


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    state, batch, step = small_state(), small_batch(), small_step(lr=0.01)
    draws = draw_step(jax.random.key(0), state.step, MODEL, 8, 1000)
    state, _ = step(state, batch, draws)
    broken = {**batch, "latents": batch["latents"].at[0, 0, 0, 0].set(jnp.nan)}
    after, metrics = step(state, broken, draws)
    assert (after.step, after.skipped, after.skipped_in_row) == (2, 1, 1)
    after, metrics = step(after, broken, draws)
    for name in ("params", "ema", "opt_state"):
        before, now = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name))
        assert all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))
    assert (after.step, after.skipped, after.skipped_in_row) == (3, 2, 2)
    after, metrics = step(after, batch, draws)
    assert (after.step, metrics["skipped"], metrics["skipped_in_row"]) == (4, 2, 0)


def test_the_learning_rate_is_no_part_of_the_program():
    def lowered(**optim):
        config = configs.default()
        config.model.update(hidden_size=16, depth=3, num_heads=2, decoder_layers=1)
        config.data.batch_size = 4
        config.optim.update(optim)
        model, adamw = MDT.from_config(config), make_optimizer(config.optim)
        mesh = parallel.make_mesh(devices=jax.devices()[:1])
        state = abstract_state(model, adamw, mesh)
        return trace_step(config, model, adamw, state, mesh).lower().as_text()

    assert lowered(lr=1e-4) == lowered(lr=3e-3) != lowered(lr=1e-4, ema_decay=0.5)


def equations(jaxpr):
    """How many there are, those of inner programs included."""
    return sum(1 + sum(map(equations, inner_jaxprs(each.params))) for each in jaxpr.eqns)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("unroll", [False, True])
def test_the_steps_jaxpr_does_not_grow_with_depth(version, unroll):
    counts = []
    for depth in (6, 28):
        model = MODEL.clone(depth=depth, version=version, unroll=unroll)
        adamw = optimizer()
        step = make_train_step(model, Objective(), adamw, 0.9)
        state = abstract_state(model, adamw, parallel.make_mesh())
        drawn = functools.partial(draw_step, model=model, batch=8, diffusion_steps=1000)
        draws = jax.eval_shape(drawn, jax.random.key(0), 0)._replace(posterior=None)
        batch = {
            "latents": jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32),
            "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
        }
        counts.append(equations(jax.make_jaxpr(step)(state, batch, draws, 1e-4).jaxpr))
    assert counts[0] == counts[1] > 500
