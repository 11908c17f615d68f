"""Trajectories, and between classes and noises."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.noise import slerp
from tests.conftest import run_here

OPTIONS = dict(seed=3, num_steps=6, guidance_scale=2.0)


@pytest.fixture(scope="module")
def digits():
    return mdt_jax.load("tests/digits.safetensors")


def assert_near(a, b):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "heun"])
def test_a_trajectory_ends_with_the_samples(digits, sampler):
    labels = [1, 2, 3]
    options = {**OPTIONS, "sampler": sampler, "spacing": "log_snr"}
    way = mdt_jax.trajectory(*digits, labels, frames=4, batch_size=2, **options)
    assert way.shape == (3, 4, 8, 8, 1)
    samples = mdt_jax.generate(*digits, labels, **options)
    assert_near(way[:, -1], samples)
    gaps = np.abs(way - samples[:, None]).mean((0, 2, 3, 4))
    assert gaps[0] > gaps[2] > gaps[3]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_between_noises_both_ends_are_samples(digits, sampler):
    options = {**OPTIONS, "sampler": sampler}
    rows = mdt_jax.interpolate_noise(*digits, [4, 7], frames=5, **options)
    assert rows.shape == (2, 5, 8, 8, 1)
    numbers, labels = [0, 1, 1, 2], [4, 4, 7, 7]
    ends = mdt_jax.generate(*digits, labels, numbers=numbers, **options)
    assert_near(rows[:, [0, -1]].reshape(4, 8, 8, 1), ends)
    steps = np.abs(np.diff(rows, axis=1)).mean((2, 3, 4))
    assert (steps < np.abs(rows[:, 0] - rows[:, -1]).mean((1, 2, 3))[:, None]).all()


def test_between_classes_both_ends_are_samples(digits):
    rows = mdt_jax.interpolate_classes(*digits, [3, 8, 1], frames=5, **OPTIONS)
    assert rows.shape == (2, 5, 8, 8, 1)
    ends = mdt_jax.generate(*digits, [3, 8, 8, 1], numbers=[0, 0, 1, 1], **OPTIONS)
    assert_near(rows[:, [0, -1]].reshape(4, 8, 8, 1), ends)
    assert np.abs(rows[:, 2] - rows[:, 0]).max() > 0.05


def test_slerp_keeps_the_length_of_noise():
    a, b = jax.random.normal(jax.random.key(0), (2, 32, 32, 4))
    lengths = [float(jnp.linalg.norm(slerp(a, b, u))) / 64 for u in (0.0, 0.3, 0.5, 1.0)]
    np.testing.assert_allclose(lengths, 1, atol=0.05)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-5)
    np.testing.assert_allclose(slerp(a, a, 0.4), a, atol=1e-5)
    np.testing.assert_allclose(slerp(a, -a, 1.0), -a, atol=1e-5)


def test_what_cannot_be_shown(digits):
    for frames in (0, 7):
        with pytest.raises(UserError, match="of 6 evaluations"):
            mdt_jax.trajectory(*digits, [1], frames=frames, **OPTIONS)
    with pytest.raises(UserError, match="takes 2 or more"):
        mdt_jax.interpolate_noise(*digits, [1], frames=1, **OPTIONS)
    with pytest.raises(UserError, match="frames is 2.5"):
        mdt_jax.interpolate_noise(*digits, [1], frames=2.5, **OPTIONS)
    with pytest.raises(UserError, match="no numbers, and one guidance_scale"):
        mdt_jax.interpolate_noise(*digits, [1], numbers=[4], **OPTIONS)
    assert mdt_jax.interpolate_noise(*digits, [], frames=3, **OPTIONS).shape == (0, 3, 8, 8, 1)
    with pytest.raises(UserError, match="two or more"):
        mdt_jax.interpolate_classes(*digits, [1], **OPTIONS)
    with pytest.raises(UserError, match="outside the classes"):
        mdt_jax.interpolate_classes(*digits, [1, 10], **OPTIONS)
    model = MDT(input_size=(4, 4), in_channels=1, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=0)  # fmt: skip
    params = init_params(model, jax.random.key(0))
    with pytest.raises(UserError, match="unconditional"):
        mdt_jax.interpolate_classes(model, params, [0, 0], **OPTIONS)


@pytest.mark.parametrize(
    "show, rows", [("trajectory", 3), ("noise", 3), ("classes", 2)], ids=lambda x: str(x)
)
def test_the_command_shows_them(show, rows, tmp_path):
    from mdt_jax import sample

    common = ["--checkpoint=tests/digits.safetensors", "--labels=3,8,1", f"--show={show}"]
    common += ["--frames=4", "--num_steps=5", "--batch_size=5"]
    run_here(sample.main, *common, f"--out={tmp_path}/a.png")
    with Image.open(tmp_path / "a.png") as strip:
        assert json.loads(strip.text["Comment"])["show"] == show
        assert strip.size == (4 * 36 - 4, rows * 36 - 4)
    run_here(sample.main, *common, f"--out={tmp_path}/a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 4 and film.info["loop"] == 0
        assert json.loads(film.info["comment"])["frames"] == 4
    assert len(list(tmp_path.iterdir())) == 2
