"""Networks in files as training programs and other people leave them."""

import argparse
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mdt_jax
from mdt_jax import convert
from mdt_jax.models.autoencoder import LatentNorm
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.weights import kinds, networks, published_files, torch_files
from mdt_jax.weights.vae import Vae
from tests.models.common import random_params
from tests.published import MODELS, VERSIONS, dit_state, published_params, published_state
from tests.small_data import VAE

FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_training_checkpoint(version, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path, state = tmp_path / "0400000.pt", published_state(f"{version}_state")
    average = {name: torch.from_numpy(array) for name, array in state.items()}
    raw = {n: tensor * 2 if tensor.is_floating_point() else tensor for n, tensor in average.items()}
    model = {f"module.{name}": tensor for name, tensor in raw.items()}
    flags = argparse.Namespace(model="MDT-S/2", lr=1e-4)
    torch.save({"model": model, "ema": average, "opt": {}, "args": flags}, path)
    weights = networks.load_weights(path)
    assert (weights.model, weights.item) == (MODELS[version], "ema")
    assert same(weights.params, published_params(f"{version}_state"))
    said = f"{path}: the weights are those under 'ema'; not used: model, opt, args\n"
    assert capsys.readouterr().err == said
    raw = networks.load_weights(path, "raw")
    assert raw.item == "raw" and same(raw.params, jax.tree.map(lambda x: 2 * x, weights.params))
    assert "those under 'model'; not used: ema, opt" in capsys.readouterr().err
    torch.save({"state_dict": model, "epoch": 3}, path)
    weights = networks.load_weights(path)
    assert weights.item is None and same(weights.params, raw.params)
    assert "the weights are those under 'state_dict'; not used: epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sampling",
    [
        ({"model": "SiT-S/2"}, published_files.SIT_SAMPLING),
        ({"model": "own", "path_type": "Linear"}, published_files.SIT_SAMPLING),
        ({"model": "DiT-S/2"}, published_files.DIT_SAMPLING),
        ({}, published_files.DIT_SAMPLING),
    ],
)
def test_the_flags_of_a_training_tell_sit_from_dit(flags, sampling, tmp_path):
    """Their checkpoints have the same names, and their files are called 0400000.pt."""
    torch = pytest.importorskip("torch")
    average = {name: torch.from_numpy(array) for name, array in dit_state("sit").items()}
    torch.save({"ema": average, "args": argparse.Namespace(**flags)}, tmp_path / "0400000.pt")
    weights = networks.load_weights(tmp_path / "0400000.pt", num_heads=2)
    assert weights.sampling == sampling and weights.item == "ema"


@pytest.mark.parametrize("name", FLOATS)
def test_halves_are_float32_in_memory_and_noted(name, tmp_path, capsys):
    state = published_state("v1_state")
    half = {n: a.astype(FLOATS[name]) if a.dtype == "f4" else a for n, a in state.items()}
    path = tmp_path / "half.safetensors"
    torch_files.write_arrays(path, half)
    weights = networks.load_weights(path)
    assert weights.stored == name
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(weights.params))
    expected = jax.tree.map(lambda x: x.astype(FLOATS[name]), published_params("v1_state"))
    assert same(weights.params, jax.tree.map(lambda x: x.astype(np.float32), expected))
    vae = Vae("a VAE", LatentNorm(1.0), VAE, random_params(VAE))
    assert Pipeline(str(path), weights, vae=vae).note()["stored"] == name
    convert.main(["convert", f"--src={path}", f"--dst={tmp_path}/whole.safetensors"])
    assert f"{path} stores {name}; whole.safetensors has float32\n" in capsys.readouterr().out
    whole = networks.load_weights(tmp_path / "whole.safetensors")
    assert whole.stored is None and same(whole.params, weights.params)
    assert "stored" not in Pipeline("whole", whole, vae=vae).note()


def test_shards(tmp_path):
    state = published_state("v2_state")
    where = {name: f"model-{n % 2 + 1}-of-2.safetensors" for n, name in enumerate(state)}
    for shard in {*where.values()}:
        held = {name: array for name, array in state.items() if where[name] == shard}
        torch_files.write_arrays(tmp_path / shard, held)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    model, params = mdt_jax.load(index)
    assert model == MODELS["v2"] and same(params, published_params("v2_state"))
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=f"{index} names the shard model-2-of-2.* does not exist"):
        mdt_jax.load(index)


def linear(*names):
    return {f"{name}.weight": np.ones((4, 4), np.float32) for name in names}


OTHERS = {
    "a LoRA adapter, not a whole network": [
        linear("base_model.model.blocks.0.attn.qkv.lora_A", "base_model.model.blocks.0.lora_B"),
        linear("lora_unet_down_blocks_0_proj_in.lora_down", "lora_unet_mid.lora_up"),
        linear("unet.mid_block.attentions.0.to_k.lora.down"),
    ],
    "a UNet of Stable Diffusion XL": [
        linear("conv_in", "down_blocks.1.attentions.0.proj_in", "add_embedding.linear_1"),
        linear("model.diffusion_model.input_blocks.0.0", "model.diffusion_model.label_emb.0.0"),
    ],
    "a UNet, which": [linear("time_embed.0", "input_blocks.1.0.in_layers.0", "label_emb")],
    "a transformer of Stable Diffusion 3": [
        linear("transformer_blocks.0.attn.add_k_proj", "context_embedder", "pos_embed.proj"),
        linear("model.diffusion_model.joint_blocks.0.x_block.attn.qkv"),
    ],
    "a transformer of Flux": [
        linear("single_transformer_blocks.0.attn.to_q", "context_embedder"),
        linear("double_blocks.0.img_attn.qkv", "img_in"),
    ],
    "a transformer of PixArt": [linear("adaln_single.linear", "transformer_blocks.0.attn1.to_q")],
    "a text encoder of CLIP": [linear("text_model.encoder.layers.0.mlp.fc1")],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_programs_networks_are_named(what, tmp_path):
    path = tmp_path / "model.safetensors"
    for state, kind in zip(OTHERS[what], ("mdt", None, "vae"), strict=False):
        torch_files.write_arrays(path, state)
        with pytest.raises(UserError, match=f"^{path} is {what}") as error:
            networks.read_network(path, kind=kind)
        assert "\n" not in str(error.value)


def test_a_vae_of_flux(tmp_path):
    """It has no quant_conv; the kind and the latents are told by the names and shapes."""
    path = tmp_path / "ae.safetensors"
    vae = VAE.clone(latent_channels=16, use_quant_conv=False)
    networks.save(path, kinds.Weights(vae, random_params(vae)))
    (tmp_path / "config.json").write_text('{"norm_num_groups": 4, "shift_factor": 0.1159}')
    assert not any("quant_conv" in name for name in torch_files.read_file(path).arrays)
    assert networks.read_network(path).model == Vae.load(path).network == vae
    assert Vae.load(path).norm == LatentNorm(shift=(0.1159,))


@pytest.mark.parametrize("name", ["weights.gguf", "weights.onnx", "weights.txt", "weights"])
def test_files_of_other_suffixes(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(30))
    with pytest.raises(UserError, match=f"^{tmp_path}/{name} is a GGUF file"):
        mdt_jax.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff" * 30)
    with pytest.raises(UserError, match=f"^{tmp_path}/{name}: unknown suffix '.*'; use one of .pt"):
        mdt_jax.load(tmp_path / name)
