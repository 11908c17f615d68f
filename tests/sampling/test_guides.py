"""Guidance by the masked pass or by another network, and the encoder's residual reused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdt_jax
from mdt_jax import sample
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling import noise
from mdt_jax.sampling.generation import request
from mdt_jax.weights import kinds, networks
from tests.conftest import exits_with_one_line, run_here
from tests.lively import LABELS, OPTIONS, load_lively
from tests.models.common import random_params
from tests.runs import DIGITS, SAMPLE

SMALL = dict(input_size=(8, 8), in_channels=1, hidden_size=16, depth=4, num_heads=2)


@pytest.fixture(scope="module")
def lively(trained):
    return load_lively(trained)


@pytest.fixture(scope="module")
def other(lively):
    """A network that may guide the lively one: smaller, of the same images and classes."""
    model = lively[0].clone(hidden_size=8, depth=2, decoder_layers=1)
    return model, random_params(model)


def draw(pair, labels=(1, 2, 3), **changes):
    return mdt_jax.generate(*pair, list(labels), **{**OPTIONS, **changes})


def by_hand(pair, weaker, steps=5, scale=2.0):
    """DDIM with guidance, from the formulas: `weaker` is (x, t) → output."""
    model, params = pair
    options = SampleOptions(sampler="ddim", num_steps=steps, clip_denoised=False)
    schedule, labels = options.schedule(), jnp.array([1, 2, 3])
    asked = request(*pair, labels.tolist(), **OPTIONS)
    _, _, key = asked.on_devices()
    x = noise.draw(model, key, asked.noise, 0)
    for i in range(steps - 1, -1, -1):
        t = jnp.full(3, int(schedule.timesteps[i]))
        strong = model.apply({"params": params}, x, t, labels)[..., :1]
        weak = weaker(x, t)[..., :1]
        eps = weak + scale * (strong - weak)
        abar, previous = schedule.alphas_cumprod[i], schedule.alphas_cumprod_prev[i]
        x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
        x = np.sqrt(previous) * x0 + np.sqrt(1 - previous) * eps
    return x


def test_another_network_guides_as_by_hand(lively, other):
    def weaker(x, t):
        return other[0].apply({"params": other[1]}, x, t, jnp.array([1, 2, 3]))

    options = dict(sampler="ddim", guidance="constant", guide="network", guide_network=other)
    expected = by_hand(lively, weaker)
    drawn = draw(lively, **options)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_an_unconditional_network_may_guide(lively):
    model = lively[0].clone(num_classes=0)
    guide = model, random_params(model)
    drawn = draw(lively, guide="network", guide_network=guide)
    assert np.isfinite(drawn).all() and np.abs(drawn - draw(lively)).max() > 1e-3


def test_a_network_that_guides_itself_and_a_pass_that_masks_nothing_change_nothing(lively):
    plain = draw(lively, guidance_scale=1.0)
    for options in (
        dict(guide="network", guide_network=lively),
        dict(guide="masked", guide_ratio=0.0),
    ):
        guided = draw(lively, guidance_scale=3.0, **options)
        np.testing.assert_allclose(guided, plain, rtol=0, atol=2e-5 * np.abs(plain).max())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_masked_pass_guides(version):
    """Each sample has masks of its own, which its batch does not change."""
    model = MDT(**SMALL, version=version, num_classes=10)
    pair = model, random_params(model)
    options = dict(guide="masked", guide_ratio=0.5)
    drawn = draw(pair, labels=[1, 1, 1], **options)
    assert np.isfinite(drawn).all() and np.abs(drawn - draw(pair, labels=[1, 1, 1])).max() > 1e-3
    alone = draw(pair, labels=[1], numbers=[2], batch_size=1, **options)
    np.testing.assert_allclose(alone[0], drawn[2], rtol=0, atol=2e-6 * np.abs(drawn).max())
    np.testing.assert_array_equal(drawn, draw(pair, labels=[1, 1, 1], **options))
    more = draw(pair, labels=[1, 1, 1], **{**options, "guide_ratio": 0.25})
    assert np.abs(more - drawn).max() > 1e-3


def test_a_model_without_classes_takes_both(lively, other):
    """Classifier-free guidance it cannot take."""
    model = MDT(**SMALL, num_classes=0)
    pair = model, random_params(model)
    small = model.clone(depth=2, decoder_layers=1)
    for options in (
        dict(guide="masked"),
        dict(guide="network", guide_network=(small, random_params(small))),
    ):
        assert np.abs(draw(pair, **options) - draw(pair, guidance_scale=1.0)).max() > 1e-3
    with pytest.raises(UserError, match="an unconditional model takes no guidance"):
        draw(pair)


class Counting(MDT):
    """Counts encoders: those of the full pass by the tokens they see."""

    def _encode(self, tokens, c, kept=None):
        jax.debug.callback(lambda: ENCODED.append(tokens.shape[0]))
        return super()._encode(tokens, c, kept)


ENCODED: list[int] = []


@pytest.mark.parametrize(
    "changes, encoded",
    [
        ({}, [4] * 6),
        (dict(encoder_every=2), [4] * 3),
        (dict(encoder_every=3, encoder_order=2), [4] * 2),
        (dict(encoder_every=9), [4]),
        (dict(encoder_every=2, sampler="heun"), [4] * 6),  # of 11 evaluations
        (dict(encoder_every=2, guidance_scale=1.0), [2] * 3),
        # Guided are 4 and 5 of 0 … 5; evaluation 4 has no residual without a class.
        (dict(encoder_every=3, guidance_high=0.3), [2, 2, 4]),
        (dict(encoder_every=2, guidance_low=0.3, guidance_high=0.7), [2, 4, 2]),
    ],
)
def test_how_often_the_encoder_is_evaluated(changes, encoded):
    model = Counting(**SMALL, num_classes=3)
    params = init_params(MDT(**SMALL, num_classes=3), jax.random.key(0))
    ENCODED.clear()
    mdt_jax.generate(
        model,
        params,
        [1, 2],
        **dict(num_steps=6, guidance_scale=3.8, guidance="constant") | changes,
    )
    jax.effects_barrier()
    assert encoded == ENCODED


def test_the_extrapolation_is_the_polynomial_through_the_last_residuals():
    options = SampleOptions(encoder_every=3, encoder_order=2)
    fresh, weights = options.encoder_schedule([True] * 12)
    assert np.flatnonzero(fresh).tolist() == [0, 3, 6, 9]
    for degree, first in ((0, 0), (1, 3), (2, 6)):  # exact as soon as there are enough
        values = (np.arange(12) + 1.0) ** degree
        for k in range(first, 12):
            known = [j for j in (9, 6, 3, 0) if j <= k][:3]
            got = sum(w * values[j] for w, j in zip(weights[k], known, strict=False))
            assert got == pytest.approx(values[k], rel=1e-6)
    assert weights[:3].tolist() == [[1, 0, 0]] * 3


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_of_two_evaluations_at_one_time_the_newer_counts(objective):
    """A residual that is linear in time is found exactly by Heun's method, too."""
    options = SampleOptions(
        "heun", num_steps=8, encoder_every=3, encoder_order=2, objective=objective
    )
    times = np.asarray(options.make_sampler().times(options.schedule()), float)
    step = np.cumsum(np.diff(times, prepend=-1) != 0)
    fresh, weights = options.encoder_schedule([True] * len(times))
    assert fresh.sum() == -(-len(times) // 3)
    for k in range(6, len(times)):
        known = [j for j in np.flatnonzero(fresh)[::-1] if j <= k][:3]
        assert step[known] @ weights[k, : len(known)] == pytest.approx(step[k], abs=1e-4)


@pytest.mark.parametrize("version, layers", [("v1", 2), ("v2", 2), ("v1", 0)])
def test_a_residual_given_replaces_the_encoder(version, layers):
    model = MDT(**SMALL, version=version, num_classes=3, decoder_layers=layers)
    params = random_params(model)
    random = np.random.RandomState(0)
    x, t = jnp.asarray(random.normal(size=(2, 8, 8, 1)), jnp.float32), jnp.array([3, 700])
    y = jnp.array([1, 2])
    plain = model.apply({"params": params}, x, t, y)
    out, residual = model.apply({"params": params}, x, t, y, method="reusing")
    np.testing.assert_allclose(out, plain, rtol=0, atol=2e-6 * np.abs(plain).max())
    again, same = model.apply({"params": params}, x, t, y, residual, method="reusing")
    np.testing.assert_allclose(again, plain, rtol=0, atol=2e-6 * np.abs(plain).max())
    np.testing.assert_array_equal(same, residual)
    moved = model.apply({"params": params}, x, t, y, -residual, method="reusing")[0]
    assert np.abs(moved - plain).max() > 1e-4


def test_a_higher_degree_is_nearer_and_all_are_near(lively):
    """More so where the steps are short."""
    digits = mdt_jax.load(DIGITS, num_steps=100, sampler="ddim", guidance_scale=2.0)
    exact = digits.generate(LABELS[:10])
    gaps = [
        np.sqrt(
            np.mean((digits.generate(LABELS[:10], encoder_every=2, encoder_order=n) - exact) ** 2)
        )
        for n in (0, 1)
    ]
    assert 0 < gaps[1] < gaps[0] < 0.05


def test_it_composes_with_skipped_guidance_and_another_network(lively, other):
    for options in (
        dict(guidance_skip_tolerance=0.1, guidance_power=1.0),
        dict(guide="network", guide_network=other),
        dict(guide="network", guide_network=other, guidance_low=0.3, guidance_high=0.7),
    ):
        exact = draw(lively, num_steps=50, **options)
        reused = draw(lively, num_steps=50, encoder_every=2, **options)
        gap = np.sqrt(np.mean((reused - exact) ** 2) / np.mean(exact**2))
        assert 0 < gap < 0.3
        alone = draw(lively, labels=[3], numbers=[2], num_steps=50, encoder_every=2, **options)
        np.testing.assert_allclose(alone[0], reused[2], rtol=0, atol=1e-4 * np.abs(reused).max())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(guide="smaller"), "guide is 'smaller'; it must be one of null, masked, network"),
        (dict(guide="network"), "guide=network takes guide_network"),
        (dict(guide="masked", guide_ratio=1.0), r"guide_ratio is 1.0; it must be in \[0, 1\)"),
        (dict(guide="masked", guide_ratio=0.99), "leaves none of the 16 tokens"),
        (dict(guide_ratio=0.3), "guide_ratio=0.3 has no effect with guide=null; leave it at 0.5"),
        (dict(encoder_order=2), "encoder_order=2 has no effect with encoder_every=1"),
        (dict(encoder_every=0), "encoder_every is 0; it must be at least 1"),
        (dict(encoder_every=2, encoder_order=3), r"encoder_order is 3; it must be in \[0, 2\]"),
        (dict(encoder_every=2, guide="masked"), "has other tokens in each evaluation"),
        (dict(guide="masked", guidance_scale=1.0), "guide=masked has no effect without guidance"),
        (dict(guide_network=(1, 2)), "guide_network has no effect with guide=null"),
    ],
)
def test_what_means_nothing_is_refused(lively, changes, message):
    with pytest.raises(UserError, match=message):
        draw(lively, **changes)


def test_networks_that_cannot_guide(lively):
    for changes, message in (
        (
            dict(input_size=(4, 4)),
            r"the guide has input_size \(4, 4\), but the network has \(8, 8\)",
        ),
        (dict(in_channels=3), "the guide has in_channels 3, but the network has 1"),
        (dict(num_classes=4), "the guide has 4 classes, but the network has 10"),
    ):
        model = lively[0].clone(**changes)
        with pytest.raises(UserError, match=message):
            draw(lively, guide="network", guide_network=(model, {}))
    dit = lively[0].clone(decoder_layers=0, relative_bias=False)
    with pytest.raises(UserError, match="guide=masked: a DiT has no masked pass"):
        draw((dit, random_params(dit)), guide="masked")


def test_the_command_takes_a_checkpoint_as_guide(trained, tmp_path):
    """The picture's note names it; the same samples are drawn from Python."""
    out = tmp_path / "a.npz"
    run_here(sample.main, *SAMPLE, f"--guide={trained}", "--num_samples=3", f"--out={out}")
    with np.load(out) as saved:
        images, note = saved["arr_0"], json.loads(str(saved["note"]))
    guide = mdt_jax.load(trained)
    assert (note["guide"], note["guide_sha256"]) == (str(trained), guide.params_sha256)
    known = dict(num_steps=3, sampler="ddim", guidance_scale=2.0)
    for given in (trained, guide):
        pipeline = mdt_jax.load(DIGITS, guide=given, **known)
        assert pipeline.options.guide == "network" and pipeline.guide.path == str(trained)
        np.testing.assert_array_equal(mdt_jax.to_uint8(pipeline.generate([0, 1, 2])), images)
    rows = ["--show=noise", "--frames=3", "--labels=1,2", f"--out={tmp_path / 'a.gif'}"]
    run_here(sample.main, *SAMPLE, f"--guide={trained}", *rows)
    masked = tmp_path / "b.npz"
    run_here(sample.main, *SAMPLE, "--guide=masked", "--num_samples=3", f"--out={masked}")
    with np.load(masked) as saved:
        assert json.loads(str(saved["note"]))["guide"] == "masked"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--guide=network"], "say the checkpoint of the network: --guide=CHECKPOINT"),
        (["--guide=runs/nothing"], "runs/nothing"),
        (["--guide=masked", "--encoder_every=2"], "nothing can be extrapolated"),
    ],
)
def test_mistakes_of_the_command(flags, message, capsys, monkeypatch, tmp_path):
    argv = [*SAMPLE, *flags, f"--out={tmp_path / 'a.png'}"]
    assert message in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert not any(tmp_path.iterdir())


def test_classes_are_not_interpolated_with_another_network(tmp_path):
    flags = ["--show=classes", "--labels=1,2", f"--guide={DIGITS}", f"--out={tmp_path / 'a.png'}"]
    printed = run_here(sample.main, *SAMPLE, *flags, expect=2)
    assert "digits.safetensors does not record what it predicts: taken for noise" in printed
    assert "interpolation between classes takes no other network as guide" in printed
    assert not (tmp_path / "a.png").exists()


def test_a_guide_predicts_what_the_network_predicts(trained, tmp_path):
    """Networks of another objective or schedule cannot guide; a file without a record is taken."""
    weights = networks.load_weights(trained)
    config = weights.config.copy_and_resolve_references()
    config.diffusion.objective = "v"
    networks.save(tmp_path / "v", weights._replace(config=config))
    with pytest.raises(
        UserError, match="has objective v, but .* which it is to guide, has epsilon"
    ):
        mdt_jax.load(trained, guide=tmp_path / "v")
    config.diffusion.objective, other = "epsilon", ("a", *weights.classes[1:])
    networks.save(tmp_path / "c", weights._replace(config=config, classes=other))
    with pytest.raises(UserError, match="has the classes a,1,.* which it is to guide, has 0,1,"):
        mdt_jax.load(trained, guide=tmp_path / "c")
    networks.save(tmp_path / "w.pt", kinds.Weights(weights.model, weights.params))
    assert mdt_jax.load(tmp_path / "v", guide=tmp_path / "w.pt").options.guide == "network"


def test_a_runs_own_guide_can_be_replaced(trained, tmp_path):
    """And it is left out where an image is completed."""
    weights = networks.load_weights(trained)
    config = weights.config.copy_and_resolve_references()
    config.sample.update(guide="masked", guide_ratio=0.25, num_steps=12)
    networks.save(tmp_path / "run", weights._replace(config=config))
    run = mdt_jax.load(tmp_path / "run")
    assert (run.options.guide, run.options.guide_ratio) == ("masked", 0.25)
    plain = mdt_jax.load(tmp_path / "run", guide="null")
    np.testing.assert_array_equal(run.generate([1, 2], guide="null"), plain.generate([1, 2]))
    other = mdt_jax.load(tmp_path / "run", guide=trained)
    assert (other.options.guide, other.options.guide_ratio) == ("network", 0.5)
    assert other.generate([1, 2], guide="masked").shape == (2, 8, 8, 1)
    hidden = np.indices((8, 8))[1] >= 4
    images = np.zeros((1, 8, 8, 1), np.float32)
    for pipeline in (run, other, plain):
        filled = pipeline.inpaint(images, hidden, [3])
        np.testing.assert_array_equal(filled, plain.inpaint(images, hidden, [3]))


def test_inpainting_takes_neither():
    digits = mdt_jax.load(DIGITS)
    hidden = np.zeros((8, 8), bool)
    hidden[:, 4:] = True
    images = np.zeros((1, 8, 8, 1), np.float32)
    for changes in (dict(guide="masked"), dict(encoder_every=2)):
        with pytest.raises(UserError, match="is for sampling, not inpainting"):
            mdt_jax.inpaint(
                *digits, images, hidden, [3], num_steps=20, guidance_scale=2.0, **changes
            )
