"""What a step minimises: passes, drawn ratio, the tokens that count, weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import config as configs
from mdt_jax.diffusion.losses import min_snr_weights
from mdt_jax.diffusion.schedule import linear_schedule
from mdt_jax.models import masking
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.train.step import Objective, draw_step
from tests.models.common import random_params
from tests.train.common import training_loss

MODEL = MDT(
    input_size=(8, 8), in_channels=1, hidden_size=16, depth=2, num_heads=2, decoder_layers=1,
    num_classes=10,
)  # fmt: skip
BATCH = {
    "latents": jax.random.uniform(jax.random.key(5), (8, 8, 8, 1), minval=-1),
    "labels": jnp.arange(8) % 10,
}
DRAWS = draw_step(jax.random.key(0), jnp.int32(0), MODEL, 8, 1000)


@functools.cache
def program(objective, model=MODEL):
    """(params, draws) → ((loss, metrics), gradient), compiled."""

    def loss(params, draws):
        return training_loss(model, objective, params, BATCH, draws)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def norm(tree):
    return float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree))))


def test_each_pass_is_its_half_of_both(params):
    (_, both), gradient = program(Objective())(params, DRAWS)
    assert norm(gradient["side_interpolater"]) > 0
    for name, other in (("full", "masked"), ("masked", "full")):
        (loss, metrics), gradient = program(Objective(passes=name))(params, DRAWS)
        assert loss == metrics[f"loss/{name}"]
        assert not [key for key in metrics if other in key]
        for key, value in metrics.items():
            if key != "loss":
                np.testing.assert_allclose(value, both[key], rtol=1e-6)
        assert (norm(gradient["side_interpolater"]) > 0) == (name == "masked")


def test_a_larger_ratio_shows_the_encoder_less():
    """The masked token count is all that the ratio changes."""
    for ratio, kept in ((0.3, 11), (0.1, 14), (0.5, 8), (0.7, 4), (0.0, 16)):
        assert masking.keep_length(16, ratio) == kept
        objective = Objective(ratio=ratio)
        text = str(jax.make_jaxpr(program(objective))(init_params(MODEL, jax.random.key(0)), DRAWS))
        # The encoder's Linear layers compute as many tokens as are kept.
        assert f"f32[{8 * kept},48]" in text


@pytest.mark.parametrize("version, relative_bias, asymmetric", [
    ("v1", True, True), ("v2", False, True), ("v1", False, False),
])  # fmt: skip
def test_a_drawn_ratio_is_the_same_ratio_fixed(version, relative_bias, asymmetric):
    """Loss and gradient both: nothing comes from the tokens beyond the length drawn."""
    changes = dict(relative_bias=relative_bias, asymmetric=asymmetric, version=version)
    model = MODEL.clone(depth=3 if version == "v2" else 2, **changes)
    params = random_params(model)
    drawn = Objective(ratio=0.3, ratio_max=0.7, passes="masked", loss_on="masked")
    lengths = set()
    for u, fixed in ((0.0, 0.3), (0.99, 0.696)):
        draws = DRAWS._replace(ratio_u=jnp.float32(u))
        (loss, metrics), gradient = program(drawn, model)(params, draws)
        lengths.add(int(metrics["kept"]))
        objective = dataclasses.replace(drawn, ratio=fixed, ratio_max=0.0)
        (expected, _), expected_gradient = program(objective, model)(params, DRAWS)
        assert loss == pytest.approx(float(expected), rel=2e-6)
        gap = jax.tree.map(lambda a, b: a - b, gradient, expected_gradient)
        assert norm(gap) < 1e-5 * norm(expected_gradient)
    assert lengths == {11, 4}
    assert program(drawn, model)._cache_size() == 1


def test_the_loss_on_masked_tokens_leaves_out_the_kept_ones():
    """A network at initialisation predicts 0, so that its squared error is the noise squared."""
    params = init_params(MODEL, jax.random.key(0))
    (_, everywhere), _ = program(Objective())(params, DRAWS)
    (_, metrics), _ = program(Objective(loss_on="masked"))(params, DRAWS)
    squared = np.square(DRAWS.noise_masked[..., 0]).reshape(8, 4, 2, 4, 2)
    of_token = squared.mean((2, 4)).reshape(8, 16)
    masked = np.asarray(DRAWS.mask_noise).argsort(axis=1)[:, 11:]
    expected = np.take_along_axis(of_token, masked, axis=1).mean()
    assert metrics["mse/masked"] == pytest.approx(expected, rel=1e-5)
    assert everywhere["mse/masked"] == pytest.approx(of_token.mean(), rel=1e-5)
    assert metrics["vb/masked"] != everywhere["vb/masked"]
    for part in ("mse", "vb", "loss"):
        np.testing.assert_allclose(metrics[f"{part}/full"], everywhere[f"{part}/full"], rtol=1e-6)


def test_min_snr_weighs_the_squared_error_alone(params):
    t = jnp.full(8, 100)
    (_, plain), _ = program(Objective())(params, DRAWS._replace(t=t))
    objective = Objective(loss_weight="min_snr_5")
    (loss, metrics), _ = program(objective)(params, DRAWS._replace(t=t))
    weight = min_snr_weights(linear_schedule())[100]
    total = 0
    for name in ("full", "masked"):
        for part in ("mse", "vb"):
            np.testing.assert_allclose(
                metrics[f"{part}/{name}"], plain[f"{part}/{name}"], rtol=1e-6
            )
        weighted = weight * plain[f"mse/{name}"]
        np.testing.assert_allclose(metrics[f"weighted_mse/{name}"], weighted, rtol=1e-5)
        total += weighted + plain[f"vb/{name}"]
    assert loss == pytest.approx(float(total), rel=1e-5)
    assert "weighted_mse/full" not in plain


def test_without_a_masked_pass_a_dit_trains():
    dit = MODEL.clone(decoder_layers=0, relative_bias=False, learned_position=False)
    params = random_params(dit)
    (loss, metrics), gradient = program(Objective(passes="full"), dit)(params, DRAWS)
    assert np.isfinite(loss) and loss == metrics["loss/full"]
    assert all(norm(part) > 0 for part in gradient.values())


def test_an_objective_is_read_from_its_config_fields():
    config = configs.default()
    changed = dict(ratio=0.2, ratio_max=0.4, passes="masked", loss_on="masked")
    config.mask.update(changed)
    fields = dict(steps=500, loss_weight="min_snr_5", objective="flow", timesteps="logit_normal")
    config.diffusion.update(fields)
    objective = Objective.from_config(config)
    assert dataclasses.asdict(objective) == changed | fields


@pytest.mark.parametrize("objective", ["v", "flow"])
def test_a_network_may_predict_something_else(objective, params):
    """Both passes have a term; flow has no variance to learn."""
    flow = objective == "flow"
    draws = draw_step(jax.random.key(0), jnp.int32(0), MODEL, 8, 1000, "uniform" if flow else None)
    (loss, metrics), gradient = program(Objective(objective=objective))(params, draws)
    assert np.isfinite(loss) and norm(gradient["side_interpolater"]) > 0
    names = {"mse"} if flow else {"mse", "vb"}
    assert {key.split("/")[0] for key in metrics} == {"loss", *names}
    for name in ("full", "masked"):
        parts = sum(metrics[f"{term}/{name}"] for term in names)
        np.testing.assert_allclose(metrics[f"loss/{name}"], parts, rtol=1e-6)
        quarters = [metrics[f"mse/{name}/q{q}"] for q in range(1, 5)]
        assert np.isfinite(quarters).any()


def test_times_of_flow():
    """Uniform, or more in the middle; the other draws are those of diffusion."""
    found = {
        name: draw_step(jax.random.key(0), jnp.int32(3), MODEL, 4000, 1000, name)
        for name in ("uniform", "logit_normal")
    }
    plain = draw_step(jax.random.key(0), jnp.int32(3), MODEL, 4000, 1000)
    for name, middle in (("uniform", 0.5), ("logit_normal", 0.7287)):  # P(|N(0, 1)| < ln 3)
        draws = found[name]
        assert draws.t.dtype == jnp.float32 and draws.t.min() >= 0 and draws.t.max() <= 1
        share = ((draws.t > 0.25) & (draws.t < 0.75)).mean()
        assert abs(share - middle) < 0.03
        for field in draws._fields:
            if field != "t":
                assert (getattr(draws, field) == getattr(plain, field)).all()
    assert (plain.t == draw_step(jax.random.key(0), jnp.int32(3), MODEL, 4000, 1000).t).all()
