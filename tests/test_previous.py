"""Files of version 0.1.0 stay readable: a run, a VAE's folder and a cache of latents.

tests/golden/README.md says how they were made, and what was recorded of them.
"""

import json
import shutil
import tarfile

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax import encode
from mdt_jax.data import latents
from mdt_jax.weights.kinds import params_sha256
from mdt_jax.weights.networks import load_weights
from mdt_jax.weights.vae import Vae
from tests.conftest import ROOT, run_here, train_here
from tests.published import GOLDEN

NUMBERS = json.loads((GOLDEN / "previous.json").read_text())
ARRAYS = np.load(GOLDEN / "previous.npz")


@pytest.fixture(scope="module")
def previous(tmp_path_factory):
    """The folder of `run`, `vae` and `cache`."""
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(GOLDEN / "previous.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_weights_are_bit_equal(previous):
    for item in ("ema", "raw"):
        weights = load_weights(previous / "run", params=item)
        assert params_sha256(weights.params) == NUMBERS[f"{item}_sha256"]
        assert weights.step == 1 and list(weights.classes) == NUMBERS["classes"]
    assert Vae.load(previous / "vae").sha256 == NUMBERS["vae_sha256"]


def test_samples_are_the_same(previous):
    model, params = mdt_jax.load(previous / "run")
    samples = mdt_jax.generate(model, params, [0, 1, 7], seed=3, num_steps=3, guidance_scale=2.0)
    np.testing.assert_allclose(samples, ARRAYS["samples"], atol=1e-4)


def test_the_run_resumes(previous, tmp_path):
    workdir = shutil.copytree(previous / "run", tmp_path / "run")
    printed = train_here(
        "--config=configs/digits.py:smoke",
        "--config.model.hidden_size=8",
        "--config.data.batch_size=16",
        "--config.sample.num_samples=0",
        "--config.train.sample_every=0",
        "--config.train.checkpoint_every=1",
        "--config.train.log_every=1",
        "--config.train.steps=2",
        f"--workdir={workdir}",
    )
    assert "resuming from step 1" in printed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(losses, NUMBERS["loss"], rtol=1e-5)
    params = load_weights(workdir, params="raw").params
    after = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(params)])
    np.testing.assert_allclose(after, ARRAYS["params"], rtol=1e-4, atol=1e-6)


def test_the_cache_is_sound_and_holds_the_same(previous):
    printed = run_here(
        encode.main,
        f"--config={ROOT}/configs/xl2.py:smoke",
        "--config.data.name=folder",
        "--config.data.path=pictures",
        "--config.data.image_size=32",
        "--config.data.channels=3",
        "--config.model.num_classes=3",
        "--config.vae.path=vae",
        "--config.vae.scale=1.0",
        "--out=cache",
        "--verify",
        cwd=previous,
    )
    assert "cache is sound: 6 images in 2 shards" in printed
    batch = latents.load(previous / "cache").take(np.arange(6), np.zeros(6))
    for name in ("mean", "std", "labels"):
        np.testing.assert_array_equal(batch[name], ARRAYS[f"cache_{name}"])
