import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import config as configs
from mdt_jax.diffusion.options import SampleOptions, random_labels
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime.errors import NotFiniteError, UserError
from mdt_jax.sampling import engine, generation
from mdt_jax.sampling.noise import Noise
from tests.conftest import ROOT, XLA_FLAGS, run_command
from tests.lively import LABELS, OPTIONS, load_lively, with_a_broken_class
from tests.published import relative_error

# Options that samples do not depend on the devices with, either.
OTHER = {"masked": {"guide": "masked"}, "reused": {"encoder_every": 2}}
EIGHT_DEVICES = f"""
OTHER = {OTHER}
import sys, jax, numpy as np, mdt_jax
from tests.lively import LABELS, OPTIONS, load_lively
assert jax.device_count() == 8
model, params = load_lively(sys.argv[1])
for size in (1, 7, 64):
    samples = mdt_jax.generate(model, params, LABELS, batch_size=size, **OPTIONS)
    np.save(sys.argv[2] + f"/{{size}}.npy", samples)
for name, options in OTHER.items():
    samples = mdt_jax.generate(model, params, LABELS, batch_size=7, **OPTIONS, **options)
    np.save(sys.argv[2] + f"/{{name}}.npy", samples)
"""


@pytest.fixture(scope="module")
def lively(trained):
    return load_lively(trained)


@pytest.fixture(scope="module")
def reference(lively):
    return mdt_jax.generate(*lively, LABELS, batch_size=64, **OPTIONS)


def assert_same_samples(got, reference):
    np.testing.assert_allclose(got, reference, atol=2e-6 * np.abs(reference).max())


@pytest.mark.parametrize("batch_size", [1, 7])
def test_samples_do_not_depend_on_the_batch_size(lively, reference, batch_size):
    samples = mdt_jax.generate(*lively, LABELS, batch_size=batch_size, **OPTIONS)
    assert_same_samples(samples, reference)
    assert np.abs(reference[0] - reference[10]).max() > 0.1, "same label, another sample"


def test_samples_do_not_depend_on_jaxs_default_generator(lively, reference):
    with jax.default_prng_impl("rbg"):
        samples = mdt_jax.generate(*lively, LABELS, batch_size=7, **OPTIONS)
    assert_same_samples(samples, reference)


def test_samples_do_not_depend_on_the_number_of_devices(trained, lively, reference, tmp_path):
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
    process = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, str(trained), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for size in (1, 7, 64):
        assert_same_samples(np.load(tmp_path / f"{size}.npy"), reference)
    for name, options in OTHER.items():
        alone = mdt_jax.generate(*lively, LABELS, batch_size=64, **OPTIONS, **options)
        assert_same_samples(np.load(tmp_path / f"{name}.npy"), alone)


def test_a_sample_depends_on_seed_number_and_label_alone(lively, reference):
    labels = LABELS.copy()
    labels[3] = 7
    samples = mdt_jax.generate(*lively, labels, batch_size=64, **OPTIONS)
    changed = np.abs(samples - reference).max(axis=(1, 2, 3)) > 1e-3
    assert np.flatnonzero(changed).tolist() == [3]
    other = mdt_jax.generate(*lively, LABELS[:4], **{**OPTIONS, "seed": 4})
    assert np.abs(other - reference[:4]).max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        dict(sampler="ddim"),
        dict(sampler="ddim", eta=0.5),
        dict(sampler="dpmpp_2m"),
        dict(sampler="dpmpp_2m_sde"),
        dict(sampler="heun"),
        dict(spacing="karras"),
        dict(spacing="log_snr"),
        dict(guidance="constant"),
        dict(guidance_low=0.3),
        dict(guidance_high=0.3),
        dict(guidance_skip_tolerance=0.5),
        dict(num_steps=4),
        dict(num_steps=4, spacing="stride"),
        dict(guidance_scale=5.0),
        dict(guidance_power=1.0),
        dict(guidance="power_cosine_printed"),
        dict(guide="masked"),
        dict(guide="masked", guide_ratio=0.2),
        dict(encoder_every=2),
        dict(encoder_every=2, encoder_order=0),
    ],
)
def test_every_option_changes_the_samples(lively, changes):
    base, changed = (
        mdt_jax.generate(*lively, [1, 2, 3], **{**OPTIONS, **more}) for more in ({}, changes)
    )
    assert np.isfinite(changed).all() and np.abs(base - changed).max() > 1e-4


def test_guidance_channels():
    model = MDT(input_size=(4, 4), in_channels=4, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=3)  # fmt: skip
    params = jax.tree.map(lambda a: a + 0.05, init_params(model, jax.random.key(0)))

    def run(channels):
        return mdt_jax.generate(
            model, params, [1], num_steps=1, sampler="ddim", guidance_power=0,
            guidance_channels=channels,
        )  # fmt: skip

    three, everything = run(3), run(0)
    np.testing.assert_allclose(three[..., :3], everything[..., :3], atol=1e-6)
    assert np.abs(three[..., 3] - everything[..., 3]).max() > 1e-4
    np.testing.assert_array_equal(run(4), everything)


def test_unconditional_model():
    model = MDT(input_size=(4, 4), in_channels=1, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=0)  # fmt: skip
    params = init_params(model, jax.random.key(0))
    samples = mdt_jax.generate(model, params, np.zeros(3, int), num_steps=2, guidance_scale=1.0)
    assert samples.shape == (3, 4, 4, 1)
    by_itself = mdt_jax.generate(model, params, np.zeros(3, int), num_steps=2)
    np.testing.assert_array_equal(samples, by_itself)
    with pytest.raises(UserError, match="unconditional model takes no guidance"):
        mdt_jax.generate(model, params, np.zeros(3, int), num_steps=2, guidance_scale=2.0)


@pytest.mark.parametrize(
    "labels, changes, message",
    [
        ([10], {}, "label 10 is outside the classes 0 to 9"),
        ([-1], {}, "label -1 is outside"),
        ([1], dict(num_steps=1001), "between 1 and the 1000 steps"),
        ([1], dict(num_steps=0), "num_steps is 0; it must be at least 1"),
        ([1], dict(num_steps=600, spacing="stride"), "no integer stride"),
        ([1], dict(sampler="x"), "sampler is 'x'; it must be one of ddpm, ddim, dpmpp_2m"),
        (
            [1],
            dict(sampler="euler"),
            "sampler is euler; a network that predicts noise takes one of ddpm",
        ),
        (
            [1],
            dict(objective="flow"),
            "sampler is ddpm; a network that predicts velocity takes one of eu",
        ),
        ([1], dict(objective="x0"), "objective is 'x0'; it must be one of epsilon, v, flow"),
        (
            [1],
            dict(objective="flow", sampler="euler", spacing="karras"),
            "the steps of flow are even",
        ),
        ([1], dict(spacing="x"), "spacing is 'x'; it must be one of even, stride, karras"),
        ([1], dict(sampler="ddim", eta=1.1), "eta is 1.1; it must be in [0, 1]"),
        ([1], dict(sampler="ddim", eta=-0.1), "eta is -0.1"),
        ([1], dict(sampler="ddim", eta=float("nan")), "eta is nan"),
        ([1], dict(eta=0.5), "eta is 0.5; the sampler ddpm has no eta"),
        ([1], dict(guidance_low=0.8, guidance_high=0.2), "0.8 is above guidance_high 0.2"),
        ([1], dict(guidance_high=1.5), "must be in [0, 1]"),
        ([1], dict(guidance_skip_tolerance=-1.0), "guidance_skip_tolerance is -1.0"),
        ([1], dict(guidance_scale=[1.0, 2.0]), "guidance_scale is 2 values for 1 samples"),
        ([1], dict(guidance_scale=[float("inf")]), "guidance_scale is inf"),
        ([1], dict(guidance_scale=["a"]), "guidance_scale is 1 values for 1 samples"),
        ([1], dict(numbers=[2**31]), "number 2147483648 is no whole number"),
        ([1], dict(numbers=[0.5]), "number 0.5 is no whole number"),
        ([1], dict(batch_size=2.5), "batch_size is 2.5"),
        ([1], dict(seed=1.5), "seed is 1.5"),
        (3, {}, "labels have the shape ()"),
        ([[1]], {}, "labels have the shape (1, 1)"),
        ([1], dict(numbers=[1, 2]), "numbers of shape (2,) for 1 samples"),
        ([1], dict(guidance="x"), "guidance is 'x'"),
        ([1], dict(guidance_scale=float("nan")), "guidance_scale"),
        ([1], dict(guidance_power=-1.0), "guidance_power"),
        ([1], dict(guidance_channels=-1), "guidance_channels"),
        ([1], dict(batch_size=0), "batch_size"),
        ([1], dict(scale=2.0), "scale"),
        ([1], dict(num_steps=2.5), "num_steps is 2.5; it must be of type int"),
        ([1], dict(clip_denoised="no"), "clip_denoised is 'no'; it must be of type bool | None"),
        ([1], dict(guidance_channels="all"), "guidance_channels is 'all'"),
        ([1], dict(seed=2**64), "seed is"),
        ([2**40], {}, "is outside the classes"),
        ([1.5], {}, "label 1.5 is not a whole number"),
        (["cat"], {}, "label 'cat' is not a whole number"),
    ],
)
def test_what_cannot_be_sampled(labels, changes, message):
    model = MDT(input_size=(4, 4), in_channels=1, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=10)  # fmt: skip
    with pytest.raises(UserError, match=re.escape(message)):
        mdt_jax.generate(model, {}, labels, **changes)


def test_the_first_sample_that_is_not_finite_is_named(lively):
    model, params = lively
    broken, how = with_a_broken_class(params, 7), dict(num_steps=2, guidance_scale=2.0)
    with pytest.raises(NotFiniteError, match="sample 5 holds NaN or infinity: the weights are"):
        mdt_jax.generate(model, broken, [0, 1, 2, 3, 4, 7, 7], batch_size=2, **how)
    assert np.isfinite(mdt_jax.generate(model, broken, [0, 1], **how)).all()
    with pytest.raises(NotFiniteError, match="sample 40 holds"):
        mdt_jax.generate(model, broken, [0, 7], numbers=[3, 40], **how)
    with pytest.raises(NotFiniteError, match="sample 1 holds"):
        mdt_jax.trajectory(model, broken, [0, 7], frames=2, **how)
    with pytest.raises(NotFiniteError, match="sample 1 holds"):
        mdt_jax.interpolate_noise(model, broken, [0, 7], frames=2, **how)
    with pytest.raises(NotFiniteError, match="sample 1 holds"):
        mdt_jax.interpolate_classes(model, broken, [0, 1, 7], frames=2, **how)


def test_predictions_of_pixels_are_clipped(lively):
    """By default: at each moment of the way, between samples, and on request not."""
    how = dict(seed=3, num_steps=3, guidance_scale=2.0)
    drawn = [
        mdt_jax.trajectory(*lively, [1, 2], frames=3, **how),
        mdt_jax.interpolate_noise(*lively, [1, 2], frames=2, **how),
        mdt_jax.interpolate_classes(*lively, [1, 2], frames=2, **how),
        mdt_jax.generate(*lively, [1, 2], sampler="heun", **how),
    ]
    for samples in drawn:
        assert np.abs(samples).max() == pytest.approx(1, abs=1e-5)
    for changes in (dict(sampler="heun"), {}):
        free = mdt_jax.generate(*lively, [1, 2], clip_denoised=False, **how, **changes)
        assert np.abs(free).max() > 1.2


def test_what_is_clipped_by_default():
    """Pixels, which the run's VAE tells, or of a model alone the number of channels."""
    config, shape = configs.default(), dict(input_size=(4, 4), hidden_size=16, depth=2, num_heads=2)
    assert SampleOptions.from_config(config).clip_denoised is True
    config.vae.path = "vae"
    assert SampleOptions.from_config(config).clip_denoised is False
    config.sample.clip_denoised = "true"
    assert SampleOptions.from_config(config).clip_denoised is True
    how = dict(labels=[0], num_steps=2, guidance_scale=1.0)
    for channels, clipped in ((1, True), (3, True), (4, False)):
        model = MDT(in_channels=channels, **shape)
        assert generation.request(model, {}, **how).options.clip_denoised is clipped
        other = generation.request(model, {}, clip_denoised=not clipped, **how)
        assert other.options.clip_denoised is not clipped


def test_an_infinity_is_not_clipped_away(lively):
    model, params = lively
    final = jax.tree.map(lambda a: jnp.full_like(a, jnp.inf), params["final_layer"])
    with pytest.raises(NotFiniteError, match="sample 0 holds"):
        mdt_jax.generate(model, {**params, "final_layer": final}, [0, 1], num_steps=2)


def test_no_labels_no_samples(trained):
    model, params = mdt_jax.load(trained)
    assert mdt_jax.generate(model, params, []).shape == (0, 8, 8, 1)


def test_command_writes_npz_and_png(trained, tmp_path):
    common = ["mdt_jax.sample", f"--checkpoint={trained}", "--labels=0,1,2", "--num_samples=7"]
    common += ["--seed=3", "--num_steps=5", "--guidance_scale=2", "--guidance_power=4"]
    common += ["--guidance_channels=all", "--sampler=ddpm", "--batch_size=4"]
    run_command(*common, f"--out={tmp_path}/new/samples.npz")
    saved = np.load(tmp_path / "new" / "samples.npz")
    assert saved["arr_0"].dtype == np.uint8 and saved["arr_0"].shape == (7, 8, 8, 1)
    assert saved["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    model, params = mdt_jax.load(trained)
    expected = mdt_jax.generate(
        model, params, saved["arr_1"], seed=3, num_steps=5, guidance_scale=2.0
    )
    difference = mdt_jax.to_uint8(expected).astype(int) - saved["arr_0"]
    assert np.abs(difference).max() <= 1
    run_command(*common, f"--out={tmp_path}/grid.png")
    assert Image.open(tmp_path / "grid.png").size == (10 * 36 - 4, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "new"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["samples.npz"]


def test_the_same_bits_twice(lively):
    one, two = (mdt_jax.generate(*lively, [1, 2], **OPTIONS) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.dtype == np.float32


class Counting(MDT):
    """An MDT that says of each evaluation how many labels are classes and how many are null."""

    def __call__(self, x, t, y=None, **masked):
        jax.debug.callback(SEEN.append, (y == self.num_classes).sum(), ordered=True)
        jax.debug.callback(SIZES.append, y.shape[0], ordered=True)
        return super().__call__(x, t, y, **masked)


SEEN, SIZES = [], []


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(
    "changes, evaluations, doubled",
    [
        (dict(sampler="ddpm"), 6, 6),
        (dict(sampler="ddim", eta=1.0), 6, 6),
        (dict(sampler="dpmpp_2m"), 6, 6),
        (dict(sampler="dpmpp_2m_sde"), 6, 6),
        (dict(sampler="heun"), 11, 11),
        (dict(guidance_scale=1.0), 6, 0),
        (dict(guidance_scale=1.0, guidance="power_cosine_printed"), 6, 6),
        (dict(guidance_low=0.3, guidance_high=0.7), 6, 2),  # t = 400, 599 of 999, 799, …, 200, 0
        (dict(guidance_low=0.3, guidance_high=0.7, sampler="heun"), 11, 4),
        (dict(guidance_skip_tolerance=0.1), 6, 3),  # the weight at 599 is 1.03, at 400 1.11
        (dict(guidance_scale=[1.0, 3.8], guidance_skip_tolerance=0.1), 6, 3),
        (dict(guidance_scale=[1.0, 1.0]), 6, 0),
    ],
)
def test_conditional_and_null_evaluations(changes, evaluations, doubled, progress):
    model = Counting(input_size=(4, 4), in_channels=1, hidden_size=16, depth=2, num_heads=2,
                     decoder_layers=1, num_classes=3)  # fmt: skip
    plain = MDT(**{f: getattr(model, f) for f in MDT.__dataclass_fields__ if f not in
                   ("parent", "name")})  # fmt: skip
    params = init_params(plain, jax.random.key(0))
    SEEN.clear()
    SIZES.clear()
    options = dict(num_steps=6, guidance_scale=3.8) | changes
    mdt_jax.generate(model, params, [1, 2], progress=progress, **options)
    jax.effects_barrier()
    assert sum(SIZES) - sum(SEEN) == 2 * evaluations, "conditional"
    assert sum(SEEN) == 2 * doubled, "null"
    assert len(SIZES) == evaluations


def test_each_sample_has_its_own_guidance_scale(lively):
    labels, common = [1, 2, 3], {**OPTIONS, "guidance_scale": [1.0, 2.0, 5.0]}
    together = mdt_jax.generate(*lively, labels, **common)
    for n, scale in enumerate(common["guidance_scale"]):
        alone = mdt_jax.generate(
            *lively, [labels[n]], numbers=[n], **{**common, "guidance_scale": scale}
        )
        assert_same_samples(together[n : n + 1], alone)


@pytest.mark.parametrize("boundary", [0.35, 0.45, 0.65, 0.7, 0.75, 0.9, 0.95])
def test_both_ends_of_the_interval_are_in_it(boundary):
    """Compiled or not: what is doubled is guided, and nothing else."""
    options = SampleOptions(num_steps=200, spacing="stride", guidance="constant",
                            guidance_scale=2.0)  # fmt: skip
    t = jnp.arange(995, -1, -5)
    for name in ("guidance_low", "guidance_high"):
        limited = dataclasses.replace(options, **{name: boundary})
        weight = np.asarray(jax.jit(limited.weight)(t, 2.0))
        doubled = limited.guided_evaluations()
        np.testing.assert_array_equal(weight == 2, doubled)
        assert doubled[t.tolist().index(round(boundary * 1000))]


def test_a_sample_does_not_depend_on_the_scales_of_others(lively):
    options = dict(num_steps=10, guidance_skip_tolerance=0.5, seed=3, clip_denoised=False)
    together = mdt_jax.generate(*lively, [1, 2], guidance_scale=[1.4, 3.8], **options)
    alone = mdt_jax.generate(*lively, [1], guidance_scale=1.4, **options)
    assert_same_samples(together[:1], alone)


def test_skipping_where_the_weight_is_nearly_one(lively):
    """What is skipped changes the samples by little, and by less the smaller the tolerance."""
    options = dict(seed=3, num_steps=40, guidance_scale=3.8)
    exact = mdt_jax.generate(*lively, LABELS[:8], **options)
    gaps = [
        np.abs(mdt_jax.generate(*lively, LABELS[:8], guidance_skip_tolerance=t, **options) - exact)
        for t in (1e-4, 1e-2)
    ]
    assert 0 < gaps[0].max() < gaps[1].max() < 0.2 * np.abs(exact).max()


def test_progress_changes_nothing(lively, reference):
    samples = mdt_jax.generate(*lively, LABELS, batch_size=64, progress=True, **OPTIONS)
    assert_same_samples(samples, reference)


def test_some_of_many(lively, reference):
    chosen = [60, 2, 2]
    samples = mdt_jax.generate(*lively, LABELS[chosen], numbers=chosen, **OPTIONS)
    assert_same_samples(samples, reference[chosen])


def test_bfloat16_is_near(lively, reference):
    model, params = lively
    samples = mdt_jax.generate(model.clone(dtype=jnp.bfloat16), params, LABELS, **OPTIONS)
    error = np.linalg.norm(samples - reference) / np.linalg.norm(reference)
    assert samples.dtype == np.float32 and 1e-5 < error < 0.1


def test_the_program_is_compiled_once(lively):
    """For all batches, a partial one, and other scales, seeds and labels."""
    before = engine.run_segment._cache_size()
    for changes in ({}, {"seed": 9}, {"guidance_scale": 3.3}, {"guidance_scale": 1.5}):
        options = {**OPTIONS, "num_steps": 3, **changes}
        mdt_jax.generate(*lively, LABELS[:11], batch_size=4, **options)
    assert engine.run_segment._cache_size() == before + 1


def seven_evaluations(model, params) -> tuple:
    """The arguments of `engine.run_segment`."""
    program = engine.Program(model, SampleOptions(num_steps=7))
    key, noise = jax.random.key(0), Noise(jnp.arange(2))
    batch = engine.Batch(key, noise, jnp.zeros(2, jnp.int32), jnp.ones(2))
    return program, engine.Segment(True, 7), params, batch, engine.start(program, batch), 0


def test_the_loop_does_not_ask_the_host(lively):
    """Its number of turns is static: a scan, no while loop with a condition to be looked at."""
    model, params = lively
    text = str(engine.run_segment.trace(*seven_evaluations(model, params)).jaxpr)
    assert "scan[" in text and "while[" not in text and "callback" not in text


@pytest.mark.parametrize("options", [
    dict(), dict(sampler="heun"), dict(sampler="dpmpp_2m", spacing="log_snr"), dict(progress=True),
    dict(guidance_scale=1.0),
], ids=str)  # fmt: skip
def test_modulations_before_the_loop_change_no_sample(lively, options, monkeypatch):
    model, params = lively
    options = {"num_steps": 7, "guidance_scale": 3.0, **options}
    expected = generation.generate(model, params, [0, 1, 2], **options)
    first = model.clone(modulate_first=True)
    computed = []
    found = MDT.modulations
    monkeypatch.setattr(
        MDT, "modulations", lambda self, *given: computed.append(1) or found(self, *given)
    )
    jax.clear_caches()
    assert relative_error(generation.generate(first, params, [0, 1, 2], **options), expected) < 1e-5
    assert computed
    # Where they would take too much memory, they are computed step by step.
    computed.clear()
    monkeypatch.setattr(engine, "MODULATION_BYTES", 0)
    jax.clear_caches()
    np.testing.assert_array_equal(
        generation.generate(first, params, [0, 1, 2], **options), expected
    )
    assert not computed


def test_blocks_are_not_sliced_out_of_their_stack_in_each_turn(lively):
    """Stacked parameters of laid out blocks are taken apart before the loop."""
    model, params = lively
    model = model.clone(unroll=True)

    def carried(model):
        """The shapes that loops of the compiled program take."""
        compiled = engine.run_segment.lower(*seven_evaluations(model, params)).compile()
        lines = [line for line in compiled.as_text().splitlines() if " while(" in line]
        return {shape for line in lines for shape in re.findall(r"\w+\[[\d,]*\]", line)}

    count, *shape = params["encoder"]["mlp_in"]["kernel"].shape
    stacked, alone = (f"f32[{','.join(map(str, each))}]" for each in ([count, *shape], shape))
    assert stacked not in carried(model) and alone in carried(model)
    assert stacked in carried(model.clone(unroll=False))
    whole = model.unstack_blocks(params)()
    jax.tree.map(np.testing.assert_array_equal, whole, params)


def test_random_labels_depend_on_seed_and_number_alone():
    many, few = (random_labels(count, 10, seed=5) for count in (20000, 7))
    np.testing.assert_array_equal(many[:7], few)
    counts = np.bincount(many, minlength=10)
    assert counts.shape == (10,) and np.abs(counts - 2000).max() < 5 * np.sqrt(1800)
    assert (random_labels(50, 10, seed=6) != many[:50]).any()
