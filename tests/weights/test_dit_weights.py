"""DiT and SiT: against recorded numbers of the published code, and against diffusers itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdt_jax
from mdt_jax import convert
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.mdt import MDT
from mdt_jax.models.resize import with_fixed_positions
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import loop, warm_start
from mdt_jax.weights import diffusers_dit, kinds, mdt_names, networks, torch_files
from tests.models.common import apply, random_params
from tests.published import dit_numbers, dit_state, guided_network, relative_error

NAMES = ("dit", "sit", "dit_no_sigma")
LABELS = np.array([1, 7, 10, 10])
SMALL = dict(input_size=(8, 8), in_channels=4, hidden_size=16, depth=2, num_heads=2)
PIPE = "diffusion_pytorch_model.safetensors"


def nhwc(array):
    return np.moveaxis(np.asarray(array), 1, -1)


def inputs(name):
    """(x [4, 8, 8, 4], t [4]) of the recorded numbers."""
    x = nhwc(dit_numbers()["x"])
    t = np.array([0.03, 0.7], np.float32) if name == "sit" else np.array([3, 999])
    return np.concatenate([x, x]), np.concatenate([t, t])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_published_ones(name):
    numbers, (x, t) = dit_numbers(), inputs(name)
    model, params = mdt_names.from_published(dit_state(name), num_heads=2)
    assert not model.learned_position and model.learn_sigma == (name != "dit_no_sigma")
    out = apply(model, params, x, t, LABELS)
    expected = nhwc(numbers[f"{name}_forward"])
    assert relative_error(out[..., : expected.shape[-1]], expected) < 2e-6
    # Without a learned variance sampling takes the upper one, β.
    assert model.learn_sigma or (np.asarray(out[..., 4:]) == 1).all()

    def network(x, t, y):
        return apply(model, params, x, t, y)

    guided = guided_network(network, jnp.asarray(LABELS[:2]), 10, lambda t: jnp.full(t.shape, 4.0))
    expected = nhwc(numbers[f"{name}_guided"])[:2]
    out = guided(x[:2], t[:2])[..., : expected.shape[-1]]
    assert relative_error(out, expected) < 2e-6


def test_a_sit_is_sampled_as_published(tmp_path):
    path = tmp_path / "SiT-S.safetensors"
    torch_files.write_arrays(path, dit_state("sit"))
    pipeline = mdt_jax.load(path, num_heads=2, num_steps=10)
    options = pipeline.options
    assert (options.objective, options.sampler, options.guidance_scale) == ("flow", "euler", 4.0)
    request = pipeline.request([1, 7])
    noise = nhwc(dit_numbers()["x"])
    samples = sampled(pipeline, noise, [1, 7], 10)
    assert relative_error(samples, nhwc(dit_numbers()["sit_euler"])) < 2e-6
    assert request.draw().shape == (2, 8, 8, 4)
    # The interval of guidance is the share of noise, as in diffusion.
    off = mdt_jax.load(path, num_heads=2, num_steps=10, guidance_low=0.0, guidance_high=0.35)
    assert off.options.guided_evaluations().tolist() == [False] * 7 + [True] * 3


def sampled(pipeline, noise, labels, null_label):
    """The samples that a pipeline draws from a given noise, [N, h, w, c]."""
    from mdt_jax.diffusion import samplers

    model, params = pipeline
    options, labels = pipeline.options, jnp.asarray(labels)

    def network(x, t, y):
        return model.apply({"params": params}, x, t, y)

    def weight(t):
        return options.weight(t, options.guidance_scale)

    guided = guided_network(network, labels, null_label, weight, options.guidance_channels or None)
    if not options.guided:
        guided = lambda x, t: network(x, t, labels)  # noqa: E731
    sampler = options.make_sampler()
    start = sampler.start(jnp.asarray(noise))
    return np.asarray(samplers.sample(guided, sampler, options.schedule(), start, lambda k: 0).x)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_files_return_as_they_came(name, suffix, tmp_path):
    state = dit_state(name)
    first, folder, last = tmp_path / f"a{suffix}", tmp_path / "b", tmp_path / f"c{suffix}"
    torch_files.write_arrays(first, state)
    convert.main(["convert", f"--src={first}", f"--dst={folder}", "--num_heads=2"])
    convert.main(["convert", f"--src={folder}", f"--dst={last}"])
    back = torch_files.read_arrays(last)
    assert set(back) == set(state)  # what load_state_dict(strict=True) asks for
    for key, array in state.items():
        assert back[key].dtype == array.dtype and np.array_equal(back[key], array), key


def test_what_a_dits_file_cannot_record(tmp_path, capsys):
    torch_files.write_arrays(tmp_path / "a.pt", dit_state("dit"))
    convert.main(["convert", f"--src={tmp_path}/a.pt", f"--dst={tmp_path}/b.pt", "--num_heads=2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["what b.pt cannot record: it must be read with num_heads=2"]
    wide = mdt_names.dit(**{**SMALL, "hidden_size": 128, "num_heads": 2})
    assert not networks.unrecorded(kinds.Weights(wide, {}))
    theirs = wide.clone(timestep_shift=1)
    assert "a DiT of diffusers" in networks.unrecorded(kinds.Weights(theirs, {}))[0]


def test_a_sit_that_leaves_is_said_to_predict_velocity(tmp_path, capsys):
    torch_files.write_arrays(tmp_path / "SiT.pt", dit_state("sit"))
    source = ["convert", f"--src={tmp_path}/SiT.pt", "--num_heads=2"]
    convert.main([*source, f"--dst={tmp_path}/b.pt"])
    assert "b.pt cannot record: it must be sampled with objective=flow" in capsys.readouterr().out
    again = mdt_jax.load(tmp_path / "b.pt", num_heads=2, objective="flow")
    assert again.options == mdt_jax.load(tmp_path / "SiT.pt", num_heads=2).options
    with pytest.raises(UserError, match="no place for a SiT, which predicts velocity"):
        convert.main([*source, f"--dst={tmp_path}/pipe", "--format=diffusers"])
    assert not (tmp_path / "pipe").exists()


def test_a_folder_keeps_how_to_sample(tmp_path):
    torch_files.write_arrays(tmp_path / "SiT.pt", dit_state("sit"))
    convert.main(["convert", f"--src={tmp_path}/SiT.pt", f"--dst={tmp_path}/sit", "--num_heads=2"])
    assert mdt_jax.load(tmp_path / "sit").options.objective == "flow"


@pytest.mark.parametrize("half", [np.float16, jnp.bfloat16])
def test_half_precision_rounds_the_positions_too(half, tmp_path):
    """As the published code has them; a network of fixed positions takes the exact ones."""
    state = {name: array.astype(half) for name, array in dit_state("dit").items()}
    model, params = mdt_names.from_published(state, num_heads=2)
    assert np.array_equal(params["pos_embed"], state["pos_embed"].astype(np.float32))
    fixed, rest = with_fixed_positions(model, params)
    assert not fixed.learned_position and "pos_embed" not in rest
    torch_files.write_arrays(tmp_path / "half.safetensors", state)
    convert.main(["convert", f"--src={tmp_path}/half.safetensors", f"--dst={tmp_path}/pipe",
                  "--num_heads=2", "--format=diffusers"])  # fmt: skip
    moved = {**params, "pos_embed": params["pos_embed"] + np.float32(0.01)}
    assert with_fixed_positions(model, moved)[0].learned_position


def test_a_file_without_classes_is_sampled_without_guidance(tmp_path):
    state = dit_state("sit")
    del state["y_embedder.embedding_table.weight"]
    torch_files.write_arrays(tmp_path / "SiT.pt", state)
    options = mdt_jax.load(tmp_path / "SiT.pt", num_heads=2).options
    assert options.objective == "flow" and not options.guided


def test_trained_positions_are_kept():
    state = dit_state("dit")
    state["pos_embed"] = state["pos_embed"] + np.float32(0.1)
    model, params = mdt_names.from_published(state, num_heads=2)
    assert model.learned_position
    assert np.array_equal(mdt_names.to_published(model, params)["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_heads_of_the_released_sizes(size):
    from mdt_jax.models.mdt import SIZES

    model = mdt_names.dit(input_size=(4, 4), in_channels=4, **{**SIZES[size], "depth": 1})
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), mdt_names.shapes(model))
    assert mdt_names.model_from_published(mdt_names.to_published(model, zeros)) == model


def test_heads_are_not_guessed_where_64_channels_do_not_divide_the_width():
    model = mdt_names.dit(**{**SMALL, "hidden_size": 96})
    state = mdt_names.to_published(model, random_params(model))
    with pytest.raises(UserError, match="say num_heads for its width of 96"):
        mdt_names.model_from_published(state)
    assert mdt_names.model_from_published(state, num_heads=2) == model


def test_another_size_needs_no_resampling_of_fixed_positions(tmp_path, capsys):
    torch_files.write_arrays(tmp_path / "a.pt", dit_state("dit"))
    mdt_jax.load(tmp_path / "a.pt", num_heads=2, input_size=(16, 16))
    assert "a.pt: positions computed anew, from 4×4 to 8×8 tokens" in capsys.readouterr().err


BAD = {
    "heads unknown": (dict(num_heads=None), {}, "say num_heads for its width of 32"),
    "heads": (dict(num_heads=5), {}, "num_heads=5 does not divide its width of 32"),
    "no heads": (dict(num_heads=0), {}, "num_heads=0 does not divide its width of 32"),
    "decoder": (dict(num_heads=2, decoder_layers=2), {}, "decoder_layers is for MDT"),
    "missing": (dict(num_heads=2), {"blocks.1.attn.qkv.bias": None},
                "the weights of a DiT: missing blocks.1.attn.qkv.bias"),
    "unexpected": (dict(num_heads=2), {"blocks.0.attn.q_norm.weight": np.zeros(16, "f4")},
                   "the weights of a DiT: unexpected blocks.0.attn.q_norm.weight"),
    "not square": (dict(num_heads=2), {"pos_embed": np.zeros((1, 12, 32), "f4")}, "pos_embed"),
    "no positions": (dict(num_heads=2), {"pos_embed": None}, "a DiT: missing pos_embed"),
    "axes": (dict(num_heads=2), {"final_layer.linear.weight": np.zeros(32, "f4")}, "2 axes"),
}  # fmt: skip


@pytest.mark.parametrize("told, changes, message", BAD.values(), ids=BAD)
def test_what_is_no_dit(told, changes, message):
    state = dit_state("dit") | changes
    state = {name: array for name, array in state.items() if array is not None}
    with pytest.raises(UserError, match=message):
        mdt_names.from_published(state, **told)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(relative_bias=True), "a DiT with a relative position bias"),
        (dict(version="v2"), "a DiT with long skips"),
        (dict(input_size=(8, 4)), "images that are not square"),
        (dict(num_classes=0), "an unconditional model"),
        (dict(qk_norm=True), "a model that normalises queries and keys"),
    ],
)
def test_what_a_dits_file_cannot_hold(fields, message):
    model = mdt_names.dit(**{**SMALL, **fields})
    for module in (mdt_names, diffusers_dit):
        with pytest.raises(UserError, match=message if module is mdt_names else "has no place for"):
            module.to_published(model, random_params(model))


@pytest.mark.parametrize("half", [False, True])
def test_a_run_starts_from_a_file_and_leaves_as_one(half, tmp_path):
    """A DiT on digits, trained from a DiT's file; its parameters leave and come back."""
    model = mdt_names.dit(
        input_size=(8, 8), in_channels=1, hidden_size=16, depth=3, num_heads=2, num_classes=10
    )
    first = tmp_path / "first.safetensors"
    state = mdt_names.to_published(model, random_params(model))
    torch_files.write_arrays(
        first, {n: array.astype(np.float16) if half else array for n, array in state.items()}
    )
    config = digits_dit()
    config.init.checkpoint = str(first)
    workdir = tmp_path / "run"
    loop.train(config, str(workdir))
    convert.main(["convert", f"--src={workdir}", f"--dst={tmp_path}/last.pt"])
    run, file = mdt_jax.load(workdir), mdt_jax.load(tmp_path / "last.pt", num_heads=2)
    assert run.model == file.model.clone(dtype=run.model.dtype, ops=run.model.ops)
    assert relative_error(file.params, run.params) == 0
    assert file.options.guidance == "constant"


def test_a_run_from_a_sit_says_that_it_predicts_velocity(tmp_path, capsys):
    config = digits_dit()
    model = MDT.from_config(config)
    config.init.checkpoint = str(tmp_path / "SiT.pt")
    networks.save(config.init.checkpoint, kinds.Weights(model, random_params(model)))
    assert warm_start.read_weights(config, tmp_path / "run", model, jax.random.key(0))
    assert "they predict velocity at times from 0 to 1" in capsys.readouterr().err


def test_a_run_does_not_start_from_a_folder_of_diffusers(pipe, tmp_path):
    config = digits_dit()
    config.init.checkpoint = str(pipe)
    with pytest.raises(UserError, match="a DiT of diffusers, .* convert it to a .pt"):
        warm_start.read_weights(config, tmp_path, MDT.from_config(config), jax.random.key(0))


def digits_dit():
    from mdt_jax import config as configs

    config = configs.load("configs/digits.py", "smoke")
    config.model.update(decoder_layers=0, side_interpolater=False)
    config.model.update(relative_bias=False, learned_position=False)
    config.mask.passes = "full"
    config.train.update(steps=2, checkpoint_every=2, sample_every=0)
    config.sample.num_samples = 0
    return config


# --- diffusers


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A DiT's published file and a VAE, and the folder that `convert` makes of them."""
    place = tmp_path_factory.mktemp("pipe")
    model = mdt_names.dit(**SMALL)
    networks.save(place / "dit.safetensors", kinds.Weights(model, random_params(model)))
    vae = AutoencoderKL(channels=(32, 32), layers=1)
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    networks.save(place / "vae.safetensors", kinds.Weights(vae, params))
    convert.main(
        ["convert", f"--src={place}/dit.safetensors", f"--dst={place}/pipe", "--num_heads=2",
         "--format=diffusers", f"--vae={place}/vae.safetensors"]
    )  # fmt: skip
    return place / "pipe"


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    pytest.importorskip("tests.torchvision_on_cpus")
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_samples_are_those_of_diffusers(scale, pipe, diffusers, monkeypatch):
    import torch

    theirs = diffusers.DiTPipeline.from_pretrained(pipe)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.get_label_ids(["golden retriever"]) == [207]
    noise = np.random.RandomState(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: torch.tensor(noise)
    )
    expected = theirs(
        [5, 207], guidance_scale=scale, num_inference_steps=10, output_type="np"
    ).images
    ours = mdt_jax.load(pipe, num_steps=10, guidance_scale=scale)
    assert ours.options.sampler == "ddim" and ours.labels(["golden retriever"]) == [207]
    images = ours.vae.decode(sampled(ours, nhwc(noise), [5, 207], 1000))
    assert relative_error(np.clip(images / 2 + 0.5, 0, 1), expected) < 2e-6


def test_a_forward_pass_of_diffusers_and_of_the_published_code_differ(pipe, diffusers):
    """By the frequencies of timesteps; each is read as what it is."""
    import torch

    transformer = diffusers.DiTTransformer2DModel.from_pretrained(pipe / "transformer")
    x = np.random.RandomState(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    t, y = np.array([3, 700]), np.array([5, 1000])
    with torch.no_grad():
        out = transformer(torch.tensor(x), torch.tensor(t), torch.tensor(y)).sample.numpy()
    folder = mdt_jax.load(pipe)
    file = mdt_jax.load(pipe.parent / "dit.safetensors", num_heads=2)
    assert relative_error(folder.params, file.params) == 0
    assert relative_error(apply(*folder, nhwc(x), t, y), nhwc(out)) < 2e-6
    assert relative_error(apply(*file, nhwc(x), t, y), nhwc(out)) > 1e-3


def test_diffusers_own_folder_is_read(diffusers, tmp_path):
    """As diffusers saves it, in half precision and with its default epsilon of 1e-5."""
    import torch

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    embedder = transformer.transformer_blocks[0].norm1.emb
    for block in transformer.transformer_blocks:  # as in every DiT
        block.norm1.emb.load_state_dict(embedder.state_dict())
    transformer = transformer.half()
    diffusers.DiTPipeline(
        transformer, diffusers.AutoencoderKL(), diffusers.DDIMScheduler(clip_sample=False)
    ).save_pretrained(tmp_path / "theirs")
    pipeline = mdt_jax.load(tmp_path / "theirs")
    assert pipeline.model.mlp_norm_eps == 1e-5 and pipeline.vae is not None
    x = np.random.RandomState(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    t, y = np.array([3, 700]), np.array([5, 1000])
    with torch.no_grad():
        whole = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "theirs" / "transformer")
        out = whole(torch.tensor(x), torch.tensor(t), torch.tensor(y)).sample.numpy()
    assert relative_error(apply(*pipeline, nhwc(x), t, y), nhwc(out)) < 2e-6
    # Out again: the same arrays under the same names.
    convert.main(["convert", f"--src={tmp_path}/theirs", f"--dst={tmp_path}/ours",
                  "--format=diffusers"])  # fmt: skip
    names = (tmp_path / name / "transformer" / PIPE for name in ("theirs", "ours"))
    theirs, ours = (torch_files.read_arrays(name) for name in names)
    assert set(theirs) == set(ours)
    assert all(np.array_equal(theirs[name].astype("f4"), ours[name]) for name in ours)
    recorded = (json.loads((tmp_path / n / "vae" / "config.json").read_text())["scaling_factor"]
                for n in ("theirs", "ours"))  # fmt: skip
    assert len(set(recorded)) == 1
    again = mdt_jax.load(tmp_path / "ours")
    assert relative_error(again.vae.params, pipeline.vae.params) == 0


def test_a_scheduler_and_a_variant_go_through(pipe, diffusers, tmp_path):
    """DDPM stays DDPM; a folder that has only the float16 variant is read."""
    whole = diffusers.DiTPipeline.from_pretrained(pipe)
    whole.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    whole.save_pretrained(tmp_path / "theirs", variant="fp16")
    assert not (tmp_path / "theirs" / "transformer" / PIPE).exists()
    options = mdt_jax.load(tmp_path / "theirs").options
    assert (options.sampler, options.eta, options.clip_denoised) == ("ddim", 1, False)
    convert.main(["convert", f"--src={tmp_path}/theirs", f"--dst={tmp_path}/ours",
                  "--format=diffusers"])  # fmt: skip
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours")
    assert isinstance(again.scheduler, diffusers.DDPMScheduler)
    assert mdt_jax.load(tmp_path / "ours").options == options
    ours, theirs = dict(again.scheduler.config), dict(whole.scheduler.config)
    assert all(ours[name] == pytest.approx(theirs[name]) for name in theirs if name[0] != "_")


CONFIGS = {
    "norm": ({"norm_type": "layer_norm"}, "norm_type in its config.json is layer_norm"),
    "heads": ({"num_attention_heads": 3}, "has the shape"),
    "size": ({"sample_size": 10**9}, "a whole number from 1 to 1024"),
    "patches": ({"sample_size": 7}, "no multiple of patch_size"),
    "text": ({"num_layers": "2"}, "num_layers in its config.json is 2"),
    "layers": ({"num_layers": 3}, "missing transformer_blocks.2"),
    "channels": ({"out_channels": 7}, "out_channels in its config.json is 7"),
    "eps": ({"norm_eps": 0}, "norm_eps in its config.json is 0"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_does_not_fit(changes, message, pipe, tmp_path):
    config = json.loads((pipe / "transformer" / "config.json").read_text())
    (tmp_path / PIPE).write_bytes((pipe / "transformer" / PIPE).read_bytes())
    with pytest.raises(UserError, match="config.json must lie beside it"):
        mdt_jax.load(tmp_path / PIPE)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        mdt_jax.load(tmp_path / PIPE)


def test_embedders_that_differ_are_refused(pipe):
    state = torch_files.read_arrays(pipe / "transformer" / PIPE)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    config = json.loads((pipe / "transformer" / "config.json").read_text())
    with pytest.raises(UserError, match="a DiT has one embedder for all"):
        diffusers_dit.from_published(state | {name: state[name] + 1}, config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule scaled_linear"),
        ({"beta_end": 0.012}, "beta_end 0.012"),
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0"),
    ],
)
def test_another_noise_schedule_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        diffusers_dit.sampling_of(changes)


def test_what_a_scheduler_says_of_sampling():
    assert diffusers_dit.sampling_of(None) == (diffusers_dit.SAMPLING, [])
    sampling, lacks = diffusers_dit.sampling_of({"_class_name": "DDPMScheduler"})
    assert sampling["eta"] == 1 and sampling["clip_denoised"] and not lacks
    sampling, lacks = diffusers_dit.sampling_of(
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    )
    assert not sampling["clip_denoised"]  # it has no clip_sample
    assert lacks == ["_class_name EulerDiscreteScheduler", "timestep_spacing trailing"]


def test_mdt_does_not_go_into_a_pipeline(tmp_path):
    model = MDT(**{**SMALL, "depth": 4})
    networks.save(tmp_path / "mdt.pt", kinds.Weights(model, random_params(model)))
    with pytest.raises(UserError, match="no place for an MDT"):
        convert.main(["convert", f"--src={tmp_path}/mdt.pt", f"--dst={tmp_path}/pipe",
                      "--format=diffusers"])  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mdt.pt"]
