"""Weights in and out by the commands, and pictures from a file."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import config as configs
from mdt_jax import convert, sample
from mdt_jax.data.classes import imagenet_label
from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
from mdt_jax.models.inception import Inception
from mdt_jax.models.mdt import MDT
from mdt_jax.models.resize import resize_grid
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.weights import kinds, networks, torch_files
from mdt_jax.weights.picking import DIFFUSERS
from mdt_jax.weights.vae import Vae, _decode
from tests.conftest import FULL_COMPILE, SMOKE, exits_with_one_line, train_here
from tests.models.common import random_params
from tests.published import (
    MODELS,
    VERSIONS,
    published_numbers,
    published_params,
    published_state,
    relative_error,
)

torch = pytest.importorskip("torch")


def run(command, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    command.main(["command", *map(str, arguments)])


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.fixture
def files(tmp_path):
    """v1.pt and v2.pt as the published code would have saved them."""
    for version in VERSIONS:
        torch_files.write_arrays(tmp_path / f"{version}.pt", published_state(f"{version}_state"))
    return tmp_path


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_to_a_folder_and_back(version, suffix, files, monkeypatch):
    run(convert, monkeypatch, f"--src={files}/{version}.pt", f"--dst={files}/folder")
    model, params = mdt_jax.load(files / "folder")
    assert model == MODELS[version] and same(params, published_params(f"{version}_state"))
    run(convert, monkeypatch, f"--src={files}/folder", f"--dst={files}/back{suffix}")
    state, back = (
        published_state(f"{version}_state"),
        torch_files.read_arrays(files / f"back{suffix}"),
    )
    assert set(back) == set(state)
    for name, array in state.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    model, params = mdt_jax.load(files / f"back{suffix}")
    assert model == MODELS[version] and same(params, published_params(f"{version}_state"))


def test_weights_that_are_not_finite_are_refused(files):
    state = published_state("v1_state")
    name = next(name for name in state if name.endswith("attn.qkv.weight"))
    state[name] = np.where(np.arange(state[name].size) == 7, np.nan, state[name].ravel()).reshape(
        state[name].shape
    )
    for suffix in (".pt", ".safetensors"):
        torch_files.write_arrays(files / f"bad{suffix}", state)
        with pytest.raises(UserError, match=r"bad\S+: \S*qkv/kernel is not finite everywhere"):
            mdt_jax.load(files / f"bad{suffix}")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_loaded_file_gives_the_recorded_numbers(version, files):
    model, params = mdt_jax.load(files / f"{version}.pt")
    golden = published_numbers(version)
    forward = jax.jit(
        lambda *inputs: model.apply({"params": params}, *inputs), compiler_options=FULL_COMPILE
    )
    out = forward(*(golden[f"fwd_{name}"] for name in "xty"))
    assert relative_error(out, golden["fwd_out"]) < 2e-6


def test_a_run_is_exported_ema_or_raw(trained, tmp_path, monkeypatch, capsys):
    run(convert, monkeypatch, f"--src={trained}", f"--dst={tmp_path}/ema.pt")
    assert "cannot record: it must be read with decoder_layers=1" in capsys.readouterr().out
    run(convert, monkeypatch, f"--src={trained}", f"--dst={tmp_path}/raw.pt", "--params=raw")
    model, ema = mdt_jax.load(trained)
    loaded, from_file = mdt_jax.load(tmp_path / "ema.pt", decoder_layers=model.decoder_layers)
    assert same(from_file, ema) and loaded.depth == model.depth
    _, raw = mdt_jax.load(tmp_path / "raw.pt", decoder_layers=model.decoder_layers)
    assert not same(raw, ema) and same(raw, mdt_jax.load(trained, params="raw")[1])
    for file in ("ema.pt", "raw.pt"):
        state = torch.load(tmp_path / file, weights_only=True)
        assert state["blocks.0.attn.rel_pos_bias.relative_position_index"].dtype == torch.int64


def test_a_network_with_qk_norm_is_a_run_or_a_folder_only(tmp_path, monkeypatch, capsys):
    workdir, folder = tmp_path / "run", tmp_path / "folder"
    off = ["--config.sample.num_samples=0", "--config.train.sample_every=0"]
    train_here(*SMOKE, *off, "--config.model.qk_norm=True", f"--workdir={workdir}")
    model, params = mdt_jax.load(workdir, params="raw")
    assert model.qk_norm
    scales = params["encoder"]["attention"]["query_norm"]["scale"]
    assert not (np.asarray(scales) == 1).any()  # they were trained
    run(convert, monkeypatch, f"--src={workdir}", f"--dst={folder}", "--params=raw")
    found = mdt_jax.load(folder)
    assert found.model == model and same(found.params, params)
    # Without the config of a run.
    networks.save(tmp_path / "alone", kinds.Weights(model, params))
    found = mdt_jax.load(tmp_path / "alone")
    assert found.model == model and same(found.params, params)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    for place in (["a.pt"], ["a.safetensors"], ["a", "--format=diffusers"]):
        argv = [f"--src={folder}", f"--dst={tmp_path}/{place[0]}", *place[1:]]
        printed = exits_with_one_line(convert.main, argv, capsys, monkeypatch)
        assert "has no place for" in printed
        assert ("queries and keys" in printed) == (len(place) == 1)  # diffusers has no MDT either
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_written_before_qk_norm_has_none():
    meta = kinds.meta_of(kinds.Weights(MODELS["v1"], {}))
    del meta["model"]["qk_norm"]
    assert kinds.network_of(meta) == MODELS["v1"]


BAD = {
    "no source": (["--src=nothing.pt", "--dst=a"], "nothing.pt does not exist"),
    "no folder": (["--src=nothing", "--dst=a"], "'nothing' does not exist"),
    "suffix": (["--src=FILES/v1.pt", "--dst=a.npz"], "unknown suffix '.npz'"),
    "taken": (["--src=FILES/v1.pt", "--dst=FILES/v2.pt"], "exists already; nothing was written"),
    "nowhere": (["--src=FILES/v1.pt", "--dst=no/where.pt"], "there is no folder"),
    "decoder": (["--src=FILES/v1.pt", "--dst=a", "--decoder_layers=9"], "it must be 1 to 3"),
    "raw file": (["--src=FILES/v1.pt", "--dst=a", "--params=best"], "invalid choice: 'best'"),
    "not told": (["--src=.", "--dst=a", "--decoder_layers=2"], "is for published files"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversions(name, files, tmp_path, capsys, monkeypatch):
    arguments, message = BAD[name]
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    argv = [argument.replace("FILES", str(files)) for argument in arguments]
    assert message in exits_with_one_line(convert.main, argv, capsys, monkeypatch)
    assert list(empty.iterdir()) == []


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """mdt.pt, a model of latents with ImageNet's classes, and a small VAE beside it."""
    folder = tmp_path_factory.mktemp("latents")
    model = MDT(
        input_size=(8, 4), in_channels=4, hidden_size=16, depth=4, num_heads=2, version="v2"
    )
    networks.save(folder / "mdt.pt", kinds.Weights(model, random_params(model)))
    vae = AutoencoderKL(channels=(32, 32), layers=1, latent_channels=4)
    params = vae.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    return folder, model, vae, params


def test_pictures_from_a_file_of_latents(latent_model, tmp_path, monkeypatch):
    folder, model, vae, params = latent_model
    monkeypatch.setattr(
        Vae, "load", lambda path, **norm: Vae(path, LatentNorm(**norm), vae, params)
    )
    common = [f"--checkpoint={folder / 'mdt.pt'}", "--vae=vae", "--num_steps=3", "--seed=5"]
    run(
        sample, monkeypatch, *common, "--labels=golden retriever,387, 12", f"--out={tmp_path}/a.npz"
    )
    file = np.load(tmp_path / "a.npz")
    assert file["arr_0"].shape == (3, 16, 8, 3) and file["arr_1"].tolist() == [207, 387, 12]
    note = json.loads(str(file["note"]))
    assert (note["vae"], note["vae_scale"], note["seed"]) == ("vae", 0.18215, 5)
    assert (note["guidance_scale"], note["guidance_power"]) == (3.8, 4.0)
    run(sample, monkeypatch, *common, "--labels=5", f"--out={tmp_path}/a.png")
    picture = json.loads(Image.open(tmp_path / "a.png").text["Comment"])
    other = {"labels": "5", "num_samples": 1, "labels_sha256": picture["labels_sha256"]}
    assert picture == note | other and picture["labels_sha256"] != note["labels_sha256"]

    latents = mdt_jax.generate(model, mdt_jax.load(folder / "mdt.pt")[1], [207, 387, 12], seed=5,
                               num_steps=3)  # fmt: skip
    decode = jax.jit(functools.partial(vae.apply, method="decode"))
    expected = decode({"params": params}, latents / 0.18215)
    np.testing.assert_allclose(
        file["arr_0"].astype(int), mdt_jax.to_uint8(expected).astype(int), atol=1
    )


def test_the_scale_of_a_files_latents(latent_model, tmp_path, monkeypatch, capsys):
    """The VAE's folder says it, also after `convert`; a flag that differs is refused."""
    folder, _, vae, params = latent_model
    file = tmp_path / f"{DIFFUSERS}.safetensors"
    networks.save(file, kinds.Weights(vae, params))
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 0.13025}))
    run(convert, monkeypatch, f"--src={file}", f"--dst={tmp_path}/saved")
    run(convert, monkeypatch, f"--src={tmp_path}/saved", f"--dst={tmp_path}/vae.bin")
    assert 'beside it, a config.json of {"scaling_factor": 0.13025}' in capsys.readouterr().out
    model = networks.load_weights(folder / "mdt.pt")
    of_run = model._replace(config=configs.default())

    def scale(name, weights, **how):
        return Pipeline(name, weights, **how).vae.norm.scale

    for path in (tmp_path, tmp_path / "saved", file):
        assert scale("mdt.pt", model, vae=str(path)) == 0.13025
        assert scale("mdt.pt", model, vae=str(path), vae_scale=0.13025) == 0.13025
        with pytest.raises(UserError, match=r"is 0\.13025, but --vae_scale is 0\.18215"):
            scale("mdt.pt", model, vae=str(path), vae_scale=0.18215)
        with pytest.raises(UserError, match=r"is 0\.13025, but run was trained with 0\.18215"):
            scale("run", of_run, vae=str(path))
    of_run.config.vae.path = str(tmp_path)  # what a run was trained with, it is drawn with
    assert scale("run", of_run) == 0.18215
    (tmp_path / "config.json").unlink()
    assert scale("mdt.pt", model, vae=str(tmp_path)) == 0.18215
    assert scale("mdt.pt", model, vae=str(tmp_path), vae_scale=0.5) == 0.5


BAD_LATENTS = {
    "no VAE": ([], "draws latents of 4 channels; to make pictures of them say --vae="),
    "no such VAE": (["--vae=nothing"], "'nothing' does not exist"),
    "no VAE there": (["--vae=CHECKPOINT"], "not the weights of a VAE: missing "),
    "pixels": (["--vae=identity"], "an image has 1 or 3 channels, not 4"),
    "folder": (["--vae=."], "holds no VAE: expected diffusion_pytorch_model.safetensors or"),
    "class": (["--vae=x", "--labels=golden retreiver"], "the nearest are golden retriever"),
    "two classes": (["--vae=x", "--labels=crane"], "names several classes: 134"),
}


@pytest.mark.parametrize("name", BAD_LATENTS)
def test_bad_latents(name, latent_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_LATENTS[name]
    checkpoint = str(latent_model[0] / "mdt.pt")
    arguments = [argument.replace("CHECKPOINT", checkpoint) for argument in arguments]
    argv = [f"--checkpoint={checkpoint}", "--out=a.png", *arguments]
    assert message in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_a_vae_of_other_latents(latent_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = AutoencoderKL(latent_channels=16)
    monkeypatch.setattr(Vae, "load", lambda path, **norm: Vae(path, LatentNorm(), vae, {}))
    argv = [f"--checkpoint={latent_model[0] / 'mdt.pt'}", "--out=a.png", "--vae=x"]
    printed = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "the latents of x have 16 channels, but the model draws 4" in printed


def test_class_names():
    for name, label in (
        ("tench", 0),
        ("Golden Retriever", 207),
        ("red panda", 387),
        ("  otter ", 360),
        ("toilet tissue", 999),
    ):
        assert imagenet_label(name) == label
    with pytest.raises(UserError, match="is no ImageNet class; the nearest are .*geyser"):
        imagenet_label("geysir")
    with pytest.raises(UserError, match="is no ImageNet class"):
        imagenet_label("")


def test_class_names_are_kept_where_there_is_a_place(tmp_path, monkeypatch, capsys):
    model = MDT(input_size=(4, 4), in_channels=1, hidden_size=16, depth=3, num_heads=2,
                num_classes=3)  # fmt: skip
    classes = ("cat", "chien", "été")
    networks.save(tmp_path / "a", kinds.Weights(model, random_params(model), classes=classes))
    chain = ["a", "b.safetensors", "c", "d.pt", "e.safetensors"]
    for src, dst in itertools.pairwise(chain):
        run(convert, monkeypatch, f"--src={tmp_path / src}", f"--dst={tmp_path / dst}")
        assert networks.load_weights(tmp_path / dst).classes == classes
    torch = pytest.importorskip("torch")
    for mmap in (False, True):
        read = torch.load(tmp_path / "d.pt", weights_only=True, mmap=mmap)
        assert read.keys() == torch_files.read_arrays(tmp_path / "e.safetensors").keys()
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = safetensors.load_file(tmp_path / "b.safetensors")
    for note in ("[", '"cat"', "[1, 2, 3]", '["a"]'):
        safetensors.save_file(arrays, tmp_path / "f.safetensors", metadata={"classes": note})
        assert networks.load_weights(tmp_path / "f.safetensors").classes == ()


def test_a_checkpoint_for_256_pixels_draws_512(tmp_path, capsys):
    """Latents of 32×32 to 64×64: bicubic positions, bias tables by offset, and a message."""
    model = MDT(input_size=(32, 32), in_channels=4, hidden_size=16, depth=3, num_heads=2,
                patch_size=4, num_classes=3)  # fmt: skip
    networks.save(tmp_path / "256.pt", kinds.Weights(model, random_params(model)))
    loaded, params = mdt_jax.load(tmp_path / "256.pt")
    assert loaded == model and capsys.readouterr().err == ""
    large, resized = mdt_jax.load(tmp_path / "256.pt", input_size=(64, 64))
    assert large.input_size == (64, 64) and same(resized, resize_grid(params, (8, 8), (16, 16)))
    assert "resampled from 8×8 to 16×16 tokens" in capsys.readouterr().err
    latents = mdt_jax.generate(large, resized, [0, 1], num_steps=2)
    assert latents.shape == (2, 64, 64, 4) and np.isfinite(latents).all()
    with pytest.raises(UserError, match="input_size is 62×64; .* multiples of 4"):
        mdt_jax.load(tmp_path / "256.pt", input_size=(62, 64))


def test_every_kind_of_network_is_told_by_its_names(latent_model, tmp_path, monkeypatch, capsys):
    """The VAE by each of its namings, and FID's Inception: to a folder, and back to a file."""
    _, _, vae, params = latent_model
    networks.save(tmp_path / "vae.safetensors", kinds.Weights(vae, params))
    run(convert, monkeypatch, f"--src={tmp_path}/vae.safetensors", f"--dst={tmp_path}/vae")
    assert "a VAE of levels 32, 32, 1 layers each, latents of 4 channels" in capsys.readouterr().out
    run(convert, monkeypatch, f"--src={tmp_path}/vae", f"--dst={tmp_path}/vae.bin")
    for source in ("vae", "vae.bin", "vae.safetensors"):
        loaded = Vae.load(tmp_path / source)
        assert loaded.network == vae and same(loaded.params, params)
    with pytest.raises(UserError, match="vae holds a VAE, not an MDT"):
        mdt_jax.load(tmp_path / "vae")

    shapes = kinds.shapes_of(Inception())
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    networks.save(tmp_path / "fid.pth", kinds.Weights(Inception(), zeros))
    run(convert, monkeypatch, f"--src={tmp_path}/fid.pth", f"--dst={tmp_path}/fid")
    assert "FID's Inception with 1008 logits" in capsys.readouterr().out
    assert same(networks.read_network(tmp_path / "fid").params, zeros)


def test_a_folder_of_diffusers_tells_its_norms(tmp_path):
    vae = AutoencoderKL(channels=(8, 16), layers=1, groups=4)
    params = jax.jit(vae.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    networks.save(tmp_path / f"{DIFFUSERS}.bin", kinds.Weights(vae, params))
    assert Vae.load(tmp_path).network.groups == 8  # as many as the narrowest level has channels
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 4}))
    assert Vae.load(tmp_path).network == vae
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 3}))
    with pytest.raises(UserError, match="cannot be normed in 3 groups"):
        Vae.load(tmp_path)


def test_a_folder_keeps_the_config_of_the_run(trained, tmp_path, monkeypatch):
    run(convert, monkeypatch, f"--src={trained}", f"--dst={tmp_path}/folder", "--params=raw")
    found, raw = networks.load_weights(tmp_path / "folder"), networks.load_weights(trained, "raw")
    assert found.config == raw.config and same(found.params, raw.params)
    argv = [f"--checkpoint={tmp_path}/folder", "--num_steps=1", "--labels=3,1"]
    run(sample, monkeypatch, *argv, f"--out={tmp_path}/a.npz")
    note = json.loads(str(np.load(tmp_path / "a.npz")["note"]))
    assert (note["parameters"], note["labels"], note["num_samples"]) == ("raw", "3,1", 2)


def test_a_resized_run_is_kept_as_what_it_is(trained, tmp_path):
    wide = networks.load_weights(trained, input_size=(8, 12))
    networks.save(tmp_path / "wide", wide)
    again = networks.load_weights(tmp_path / "wide")
    assert again.model.input_size == (8, 12) and same(again.params, wide.params)


def test_decoding_in_slices_is_decoding_at_once(latent_model):
    _, _, network, params = latent_model
    vae, other = (Vae("vae", LatentNorm(scale), network, params) for scale in (0.18215, 0.5))
    latents = np.random.default_rng(0).normal(size=(5, 4, 2, 4)).astype(np.float32)
    run = functools.partial(vae.decode, batch_size=2)
    whole = run(latents, batch_size=5)
    np.testing.assert_allclose(run(latents), whole, atol=1e-5)
    scaled = other.decode(latents, batch_size=2)
    np.testing.assert_allclose(scaled, run(latents * 0.18215 / 0.5), atol=1e-4)
    assert run(latents[:0]).shape == (0, 8, 4, 3)
    with pytest.raises(UserError, match="latents have 4 channels, but the model draws 3"):
        run(latents[..., :3])


def test_any_number_of_latents_is_decoded_by_one_program(latent_model):
    _, model, vae, params = latent_model
    latents = np.random.default_rng(0).normal(size=(20, *model.input_size, 4)).astype(np.float32)
    alone = jax.jit(functools.partial(vae.apply, method="decode"))
    expected = mdt_jax.to_uint8(alone({"params": params}, latents / 0.5)).astype(int)
    scaled = Vae("vae", LatentNorm(0.5), vae, params)
    to_images = Pipeline("mdt", kinds.Weights(model, {}), vae=scaled).to_images
    before = _decode._cache_size()
    for count in (20, 3, 5, 7):
        np.testing.assert_allclose(to_images(latents[:count], 12), expected[:count], atol=1)
    assert _decode._cache_size() == before + 1
    # Without a batch size, too: as many latents as a device takes at once.
    few, more = (scaled.decode(latents[:count]) for count in (2, 20))
    np.testing.assert_array_equal(few, more[:2])
    assert _decode._cache_size() == before + 2
