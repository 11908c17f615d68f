"""Runs whose network predicts v or velocity: training, sampling, conversion, fine-tuning."""

import json

import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import convert, inpaint, sample
from tests.conftest import SMOKE, run_here, train_here
from tests.runs import lines_of

FLAGS = {
    "v": ["--config.diffusion.objective=v", "--config.diffusion.loss_weight=min_snr_5"],
    "flow": [
        "--config.diffusion.objective=flow",
        "--config.diffusion.timesteps=logit_normal",
        "--config.sample.sampler=heun",
        "--config.model.version=v2",
        "--config.mask.ratio_max=0.5",
    ],
}


def losses(workdir):
    lines = [json.loads(line) for line in lines_of(workdir)]
    return [{k: v for k, v in line.items() if "loss" in k or "mse" in k} for line in lines]


@pytest.fixture(scope="module", params=FLAGS)
def run(request, tmp_path_factory):
    """(objective, flags, the workdir of a run of six steps, what it printed)."""
    workdir = tmp_path_factory.mktemp(request.param)
    flags = [*SMOKE, *FLAGS[request.param], "--config.train.steps=6"]
    return request.param, flags, workdir, train_here(*flags, f"--workdir={workdir}")


def test_a_run_is_measured_and_goes_on(run, tmp_path):
    objective, flags, workdir, _ = run
    report = json.loads((workdir / "report.json").read_text())
    assert report["num_samples"] == 20 and report["skipped"] == 0
    assert ("vb/full" in json.loads(lines_of(workdir)[0])) == (objective == "v")
    train_here(*flags, f"--workdir={tmp_path}", "--config.train.steps=4")
    train_here(*flags, f"--workdir={tmp_path}")
    assert losses(tmp_path) == losses(workdir) and len(losses(workdir)) == 6


def test_a_file_says_nothing_of_it_but_takes_the_option(run, tmp_path):
    objective, _, workdir, _ = run
    file = tmp_path / "w.safetensors"
    printed = run_here(convert.main, f"--src={workdir}", f"--dst={file}")
    assert f"it must be sampled with objective={objective}" in printed
    known = {"sampler": "heun", "num_steps": 3, "guidance_scale": 2.0, "clip_denoised": True}
    of_run = mdt_jax.load(workdir, **known)
    of_file = mdt_jax.load(file, objective=objective, **known)
    assert of_run.options.objective == of_file.options.objective == objective
    drawn = [mdt_jax.generate(*each, [3, 8], options=each.options) for each in (of_run, of_file)]
    np.testing.assert_allclose(*drawn, rtol=0, atol=1e-5)
    as_noise = mdt_jax.load(file, **known)
    assert (
        np.abs(mdt_jax.generate(*as_noise, [3, 8], options=as_noise.options) - drawn[0]).max()
        > 0.01
    )


def test_another_objective_than_the_run_s_is_refused(run, tmp_path):
    objective, _, workdir, _ = run
    out = f"--out={tmp_path / 'a.png'}"
    printed = run_here(sample.main, f"--checkpoint={workdir}", "--objective=epsilon", out, expect=2)
    assert f"objective is epsilon, but {workdir} was trained with {objective}" in printed
    assert not (tmp_path / "a.png").exists()


def test_a_run_for_noise_starts_from_its_weights_and_says_so(run, tmp_path):
    objective, flags, workdir, _ = run
    same = [*flags, "--config.train.steps=1", "--config.sample.num_samples=0"]
    start = f"--config.init.checkpoint={workdir}"
    printed = train_here(*same, start, f"--workdir={tmp_path / 'same'}")
    assert "they predict" not in printed
    other = [flag for flag in same if "diffusion" not in flag and "sampler" not in flag]
    printed = train_here(*other, start, f"--workdir={tmp_path / 'other'}")
    kind = {"v": "v", "flow": "velocity at times from 0 to 1"}[objective]
    assert f"init.checkpoint: they predict {kind}, but the run trains for noise" in printed


def test_inpainting_takes_v_and_refuses_velocity(run, tmp_path):
    objective, _, workdir, _ = run
    image, mask, out = (tmp_path / name for name in ("image.png", "mask.png", "out.png"))
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(image)
    Image.fromarray(np.uint8(255 * (np.indices((8, 8))[1] >= 4))).save(mask)
    flags = [f"--checkpoint={workdir}", f"--image={image}", f"--mask={mask}", f"--out={out}"]
    sampler = "heun" if objective == "flow" else "ddim"
    flags += [f"--sampler={sampler}", "--num_steps=12", "--label=3"]
    printed = run_here(inpaint.main, *flags, expect=2 if objective == "flow" else 0)
    assert ("a network that predicts noise or v, not velocity" in printed) == (objective == "flow")
    assert out.exists() == (objective == "v")
    if objective == "v":
        drawn = np.asarray(Image.open(out))
        assert (drawn[:, :4] == 128).all() and (drawn[:, 4:] != 128).any()
