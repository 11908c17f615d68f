"""Python's `load`: what it gives is (model, params), and knows its run."""

import inspect
import os
import pathlib
import pydoc
import subprocess
import sys

import numpy as np
import pytest

import mdt_jax
from mdt_jax import config as configs
from mdt_jax import sample
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import kinds, networks
from tests.conftest import ROOT, run_here
from tests.models.common import random_params
from tests.runs import DIGITS
from tests.small_data import VAE, write_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three named classes as `convert` keeps it, and its VAE."""
    folder = tmp_path_factory.mktemp("run")
    write_vae(folder / "vae")
    config = configs.default()
    config.model.update(hidden_size=16, depth=2, num_heads=2, decoder_layers=1, num_classes=3)
    config.data.update(image_size=64, channels=3)
    config.vae.update(path=str(folder / "vae"), scale=0.5)
    config.sample.update(sampler="ddim", num_steps=3, guidance_scale=2.0)
    model, names = MDT.from_config(config), ("cat", "dog", "10")
    params = random_params(model)
    networks.save(folder / "run", kinds.Weights(model, params, config, "ema", names, 7))
    return folder


def test_it_unpacks_as_model_and_parameters(folder):
    run = mdt_jax.load(folder / "run")
    model, params = run
    assert len(run) == 2 and run[0] is model and run.model is model and run.params is params
    assert isinstance(run, tuple) and isinstance(model, MDT) and isinstance(params, dict)


def test_it_draws_as_the_command_does(folder, tmp_path):
    run = mdt_jax.load(folder / "run")
    assert (run.options.num_steps, run.options.guidance_scale) == (3, 2.0)
    assert run.options == SampleOptions.from_config(run.config) and run.weights.step == 7
    out = tmp_path / "samples.npz"
    flags = [f"--checkpoint={folder / 'run'}", "--labels=dog,cat", "--seed=4", f"--out={out}"]
    run_here(sample.main, *flags)
    drawn = mdt_jax.generate(*run, run.labels(["dog", "cat"]), seed=4, options=run.options)
    assert drawn.shape == (2, 8, 8, 4)
    with np.load(out) as saved:
        assert np.abs(saved["arr_0"].astype(int) - run.to_images(drawn)).max() <= 1
    np.testing.assert_array_equal(run.generate(["dog", 0], seed=4), drawn)
    other = run.generate(["dog", 0], seed=4, num_steps=2)
    assert np.abs(other - drawn).max() > 1e-4


def test_it_knows_its_classes_and_its_vae(folder):
    run = mdt_jax.load(folder / "run")
    assert run.classes == ("cat", "dog", "10")
    assert run.labels(["10", "dog", 0, "number:2"]).tolist() == [2, 1, 0, 2]
    assert run.labels(np.array([1, 2])).dtype == np.int32
    for wrong, message in (["bird"], "'bird' is no class"), ([3], "outside"), ("cat", "the shape"):
        with pytest.raises(UserError, match=message):
            run.labels(wrong)
    with pytest.raises(UserError, match="label 0.5 is not a whole number"):
        run.generate([0.5])
    assert (
        run.vae is run.vae
        and run.vae.norm.scale == 0.5
        and run.vae.network.channels == VAE.channels
    )


def test_a_file_of_pixels_and_one_of_latents(folder, tmp_path):
    digits = mdt_jax.load(DIGITS)
    assert (
        digits.vae is None
        and digits.config is None
        and digits.options == SampleOptions(clip_denoised=True)
    )
    samples = np.full((1, 8, 8, 1), 0.5, np.float32)
    np.testing.assert_array_equal(digits.to_images(samples), mdt_jax.to_uint8(samples))
    model, params = mdt_jax.load(folder / "run")
    networks.save(tmp_path / "file.safetensors", kinds.Weights(model, params))
    latents, how = np.zeros((1, 8, 8, 4), np.float32), dict(decoder_layers=1)
    with pytest.raises(UserError, match="to make pictures of them say"):
        mdt_jax.load(tmp_path / "file.safetensors", **how).to_images(latents)
    run = mdt_jax.load(tmp_path / "file.safetensors", vae=f"{folder}/vae", vae_scale=0.5, **how)
    assert run.to_images(latents).shape == (1, 64, 64, 3)
    assert run.options.clip_denoised is False


def test_what_python_has_is_shown_with_its_types():
    shown = pydoc.plain(pydoc.render_doc(mdt_jax))
    for name in ("load", "generate", "trajectory", "inpaint", "fid", "to_uint8"):
        function = getattr(mdt_jax, name)
        assert name in dir(mdt_jax) and f"    {name}(" in shown
        signature = inspect.signature(function)
        typed = [p for p in signature.parameters.values() if p.annotation is not p.empty]
        assert typed and signature.return_annotation is not signature.empty, name
    assert {"Pipeline", "Run", "SampleOptions", "InpaintOptions"} <= set(dir(mdt_jax))


def test_inpaint_is_a_function_and_the_command(folder):
    """Whichever was imported first."""
    code = "from mdt_jax import inpaint as first; import mdt_jax.inpaint as module, mdt_jax; "
    code += "assert first is module is mdt_jax.inpaint and callable(first) and module.main"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    run, hidden = mdt_jax.load(folder / "run"), np.arange(8) >= np.full((8, 1), 4)
    given = np.zeros((1, 8, 8, 4), np.float32)
    how = mdt_jax.InpaintOptions(num_resamples=1)
    out = mdt_jax.inpaint(*run, given, hidden, [1], how=how, options=run.options)
    assert out.shape == given.shape and not out[:, :, :4].any() and out[:, :, 4:].all()


def test_compiled_programs_are_kept_where_the_commands_keep_them(tmp_path):
    code = f"import jax, mdt_jax; jax.numpy.ones(3) + 1; mdt_jax.load({DIGITS!r}); "
    code += "print(jax.config.values['jax_compilation_cache_dir'])"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "mdt_jax" / "xla"), done.stderr
    assert pathlib.Path(done.stdout.strip()).is_dir()
