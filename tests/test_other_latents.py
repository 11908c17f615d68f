"""Latents of other VAEs than Stable Diffusion's, of images that are not square, from end to end."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import cli, convert, encode, evaluate, inpaint, main, sample
from mdt_jax.data import latents
from mdt_jax.evaluation import image_sets
from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import parallel
from mdt_jax.train import inputs
from mdt_jax.weights import kinds, networks, vae_names
from mdt_jax.weights.vae import Vae, norm_of
from tests.conftest import run_here, train_here
from tests.models.common import random_params
from tests.small_data import write_pictures

NETWORK = AutoencoderKL(
    channels=(8, 8, 8),
    layers=1,
    latent_channels=6,
    groups=4,
    use_quant_conv=False,
    attention_levels=(2,),
)
NORM = LatentNorm(1.25, (0.1, -0.2, 0.3, 0.0, 0.5, 0.25), (1.0, 2.0, 0.5, 1.5, 1.0, 0.75))
SIDES = ["--config.data.image_size=32", "--config.data.image_width=48"]
RUN = ["--config.train.steps=3", "--config.train.checkpoint_every=3",
       "--config.train.sample_every=0",
       "--config.sample.num_samples=0"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pictures`, a `vae` in diffusers' layout, and a `cache` of theirs."""
    folder = tmp_path_factory.mktemp("latents")
    write_pictures(folder / "pictures", 40)
    (folder / "vae").mkdir()
    weights = kinds.Weights(NETWORK, random_params(NETWORK))
    networks.save(folder / "vae" / "diffusion_pytorch_model.safetensors", weights)
    config = vae_names.config_of(NETWORK, NORM)
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    said = run_here(encode.main, *flags(folder), f"--out={folder / 'cache'}")
    assert f"as {folder / 'vae'} records" in said
    return folder


def flags(folder, name="folder", path="pictures", *others):
    return [
        "--config=configs/xl2.py:smoke",
        f"--config.data.name={name}",
        f"--config.data.path={folder / path}",
        *SIDES,
        "--config.data.channels=3",
        "--config.model.num_classes=3",
        f"--config.vae.path={folder / 'vae'}",
        "--config.vae.factor=4",
        "--config.vae.channels=6",
        f"--config.vae.scale={NORM.scale}",
        *others,
    ]


@pytest.fixture(scope="module")
def run(place):
    workdir = place / "run"
    train_here(*flags(place, "latents", "cache"), *RUN, f"--workdir={workdir}")
    return workdir


def test_a_cache_records_its_latents(place):
    manifest = latents.load(place / "cache").manifest
    assert manifest["latents"] == [8, 12, 6] and manifest["image_size"] == [32, 48]
    assert LatentNorm(*(manifest[name] for name in ("scale", "shift", "std"))) == LatentNorm(
        NORM.scale, list(NORM.shift), list(NORM.std)
    )
    assert len(manifest["channel_mean"]) == len(manifest["channel_std"]) == 6
    _, moments, _ = latents.load(place / "cache").read(np.arange(40))
    moments = moments.astype(np.float64)
    mean = moments[:, ::2].mean((0, 1, 2, 3))
    variance = (moments[:, ::2] ** 2 + moments[:, 1::2] ** 2).mean((0, 1, 2, 3)) - mean**2
    np.testing.assert_allclose(manifest["channel_mean"], mean, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(manifest["channel_std"], np.sqrt(variance), rtol=1e-6)
    verified = run_here(encode.main, *flags(place), f"--out={place / 'cache'}", "--verify")
    assert "is sound: 40 images in 1 shards; latents have a deviation of 0.9387, normal" in verified
    scaled = [*flags(place), "--config.vae.std=0.2", f"--out={place / 'cache'}", "--verify"]
    assert "take latents_std out of" in run_here(encode.main, *scaled, expect=2)


def test_the_deviation_is_that_of_normalised_draws(place):
    """Of each channel, too; of shards that did not tell channels apart, where it can be."""
    manifest = latents.load(place / "cache").manifest
    sums = latents.sums_of(manifest)
    _, moments, _ = latents.load(place / "cache").read(np.arange(40))
    views = moments.astype(np.float32).reshape(40, 2, 2, 8, 12, 6)
    noise = np.random.default_rng(0).normal(size=(40, 2, 8, 12, 6)).astype(np.float32)
    drawn = NORM.apply(views[:, :, 0] + views[:, :, 1] * noise)
    assert sums.deviation(*NORM) == pytest.approx(drawn.std(), rel=0.02)
    old = {**manifest, "shards": [
        {**shard, **{name: sum(shard[name]) for name in ("sum", "squares")}}
        for shard in manifest["shards"]
    ]}  # fmt: skip
    assert latents.sums_of(old).deviation() == pytest.approx(sums.deviation())
    both = {**manifest, "shards": manifest["shards"] + old["shards"]}
    assert latents.sums_of(both).deviation() == pytest.approx(sums.deviation())
    assert np.isnan(latents.sums_of(old).deviation(*NORM))
    assert inputs.doubt_norm(latents.sums_of(old), NORM) == ""


def test_estimated_channels_make_latents_of_mean_0_and_deviation_1(place):
    said = run_here(encode.main, *flags(place), "--estimate_scale")
    scale = float(said.partition("vae.scale: ")[2].split(",")[0])
    assert "less vae.shift and divided by vae.std" in said
    sums = latents.sums_of(latents.load(place / "cache").manifest)
    assert sums.deviation(scale, NORM.shift, NORM.std) == pytest.approx(1, rel=1e-2)
    found = dict(part.removeprefix("--config.vae.").split("=") for part in said.split()
                 if part.startswith("--config.vae."))  # fmt: skip
    shift, std = (tuple(map(float, found[name].split(","))) for name in ("shift", "std"))
    sums = latents.sums_of(latents.load(place / "cache").manifest)
    np.testing.assert_allclose(shift, sums.mean, rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(std, sums.std, rtol=1e-2)
    assert found["scale"] == "1" and sums.deviation(1.0, shift, std) == pytest.approx(1, rel=1e-2)
    assert inputs.doubt_norm(sums, LatentNorm(1.0, shift, std)) == ""


def test_a_run_records_the_norm_and_resumes(place, run):
    config = mdt_jax.load(run).config
    assert norm_of(config) == NORM and config.vae.shift == "0.1,-0.2,0.3,0.0,0.5,0.25"
    again = train_here(*flags(place, "latents", "cache"), *RUN, "--config.train.steps=4",
                       f"--workdir={run}")  # fmt: skip
    assert "resuming with vae." not in again
    other = train_here(*flags(place, "latents", "cache"), *RUN, "--config.train.steps=5",
                       "--config.vae.shift=0.1", f"--workdir={run}", expect=2)  # fmt: skip
    assert "vae.shift is 0.1, but the shift_factor plus latents_mean of" in other


def test_online_and_cached_training_see_the_same(place):
    """The images in the same order; the mean is the encoder's."""
    argv = [flags(place), flags(place, "latents", "cache")]
    found = []
    for each in argv:
        config, _ = cli.read_config(main.parse(["main", *each, "--workdir=x"]))
        batches = inputs.feed(config, inputs.open_inputs(config), parallel.make_mesh(), 0)
        found.append(next(batches))
        batches.close()
    assert found[0]["mean"].shape == (16, 8, 12, 6)
    np.testing.assert_allclose(found[0]["mean"], found[1]["mean"], rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(found[0]["labels"], found[1]["labels"])


def test_pictures_of_a_run_are_decoded_with_its_norm(place, run, tmp_path):
    out = tmp_path / "a.npz"
    run_here(
        sample.main,
        f"--checkpoint={run}",
        "--labels=name:9,name:10",
        "--num_steps=3",
        f"--out={out}",
    )
    with np.load(out) as saved:
        images, note = saved["arr_0"], json.loads(str(saved["note"]))
    assert images.shape == (2, 32, 48, 3)
    assert (note["vae_scale"], tuple(note["vae_shift"]), tuple(note["vae_std"])) == NORM
    pipeline = mdt_jax.load(run, num_steps=3)
    drawn = pipeline.generate([1, 2])
    assert drawn.shape == (2, 8, 12, 6)
    params = Vae.load(place / "vae").params
    decode = jax.jit(lambda z: NETWORK.apply({"params": params}, z, method="decode"))
    expected = mdt_jax.to_uint8(decode(drawn / NORM.scale * NORM.std + NORM.shift))
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    sides = cli.sides("32x48")
    assert (sides, cli.sides("32")) == ((32, 48), (32, 32))
    assert image_sets.open_images(str(place / "pictures"), sides).take([3]).shape == (1, *sides, 3)


def test_what_a_vae_loses_does_not_depend_on_its_norm(place, tmp_path):
    file = "diffusion_pytorch_model.safetensors"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / file).write_bytes((place / "vae" / file).read_bytes())
    (tmp_path / "bare" / "config.json").write_text('{"norm_num_groups": 4}')
    lines = [
        run_here(evaluate.main, f"--vae={vae}", f"--images={place / 'pictures'}",
                 "--image_size=32x48").splitlines()
        for vae in (place / "vae", tmp_path / "bare")
    ]  # fmt: skip
    psnr = [[line for line in each if "psnr" in line.lower()] for each in lines]
    assert psnr[0] == psnr[1] != []


def test_inpainting_takes_it(place, run, tmp_path):
    image, mask, out = (tmp_path / name for name in ("image.png", "mask.png", "out.png"))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(np.uint8(255 * (np.indices((64, 96))[1] >= 48))).save(mask)
    run_here(inpaint.main, f"--checkpoint={run}", f"--image={image}", f"--mask={mask}",
             "--label=1", "--num_steps=12", "--resize", f"--out={out}")  # fmt: skip
    assert Image.open(out).size == (48, 32)


def test_another_vae_needs_other_flags(place, tmp_path):
    argv = [flag for flag in flags(place) if "factor" not in flag and "vae.channels" not in flag]
    said = train_here(*argv, *RUN, f"--workdir={tmp_path / 'run'}", expect=2)
    assert "set --config.vae.channels=6 --config.vae.factor=4" in said
    said = train_here(*flags(place, "latents", "cache", "--config.data.image_width=0"), *RUN,
                      f"--workdir={tmp_path / 'run'}", expect=2)  # fmt: skip
    assert "was made with data.image_size [32, 48], not 32×32" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("shift=0.1,0.2", "vae.shift has 2 numbers; it must be one, or 6, one for each channel"),
        ("std=1,1,1,1,1,0", "vae.std is '1,1,1,1,1,0'; it must be a positive number, several"),
        ("shift=a", "vae.shift is 'a'; it must be a number, several with commas"),
        ("factor=0", "vae.factor is 0; it must be at least 1"),
        ("factor=32", "data.image_size 32×48 must be a multiple of 32 for the VAE"),
    ],
)
def test_norms_that_cannot_be(place, flag, message, tmp_path):
    argv = [*flags(place), f"--config.vae.{flag}", *RUN, f"--workdir={tmp_path / 'run'}"]
    said = train_here(*argv, expect=2)
    assert message in said and not (tmp_path / "run").exists()


def test_a_file_of_the_run_says_what_its_vae_must_record(place, run, tmp_path):
    said = run_here(convert.main, f"--src={run}", f"--dst={tmp_path / 'w.safetensors'}")
    fields = said.partition("with a config.json of ")[2].partition(" beside it")[0]
    assert json.loads(fields) == vae_names.config_of_norm(NORM)
    assert f"it draws latents of {place / 'vae'}: give it by --vae" in said


def test_diffusers_pipeline_has_no_place_for_a_shift(place, tmp_path):
    """It only divides by the scaling_factor."""
    config = mdt_jax.load(place / "run").config.copy_and_resolve_references()
    config.model.update(decoder_layers=0, relative_bias=False, learned_position=False)
    config.mask.passes, model = "full", MDT.from_config(config)
    networks.save(tmp_path / "dit", kinds.Weights(model, random_params(model), config))
    argv = [f"--src={tmp_path / 'dit'}", f"--dst={tmp_path / 'out'}", "--format=diffusers"]
    said = run_here(convert.main, *argv, expect=2)
    assert "are also shifted, or divided by a deviation" in said
    assert not (tmp_path / "out").exists()


def test_without_a_vae_its_fields_have_no_effect(tmp_path):
    said = train_here("--config=configs/digits.py:smoke", "--config.vae.channels=6",
                      f"--workdir={tmp_path / 'run'}", expect=2)  # fmt: skip
    assert "vae.channels=6 has no effect with vae.path=identity; leave it at 4" in said
