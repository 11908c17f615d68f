"""The VAE against diffusers' own, with random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.vae_names import (
    about_latents,
    config_of,
    config_of_norm,
    from_published,
    is_vae,
    recorded_norm,
    to_published,
)
from tests.published import GOLDEN, random_arrays, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("tests.torchvision_on_cpus")
diffusers = pytest.importorskip("diffusers")

SMALL = dict(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
)
STABLE_DIFFUSION = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)
# Stable Diffusion XL's has the shape of Stable Diffusion 1's; that of 3 and Flux's are these.
SD3 = STABLE_DIFFUSION | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
SMALL_16 = SMALL | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
ATTENTIVE = SMALL | dict(
    latent_channels=8,
    down_block_types=(*["DownEncoderBlock2D"] * 2, "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 2),
)


def theirs(shape):
    """diffusers' network; norms and biases random, too."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**{"latent_channels": 4, **shape}).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def arrays(vae):
    return {name: tensor.numpy() for name, tensor in vae.state_dict().items()}


def compvis_names(state):
    """The same weights as the original code names them."""
    levels = 1 + max(int(m[1]) for n in state if (m := re.match(r"decoder\.up_blocks\.(\d)", n)))
    renamed = {}
    for name, array in state.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.attentions", r"down.\1.attn", name)
        name = re.sub(
            r"up_blocks\.(\d)\.attentions", lambda m: f"up.{levels - 1 - int(m[1])}.attn", name
        )
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name
        )
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0",
            lambda m: f"up.{levels - 1 - int(m[1])}.upsample",
            name,
        )
        name = name.replace("mid_block.resnets.0", "mid.block_1")
        name = name.replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for new, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                array = array[:, :, None, None] if array.ndim == 2 else array
        renamed[name] = array
    return renamed


def old_names(state):
    pairs = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    for new, old in pairs:
        state = {name.replace(f".{new}.", f".{old}."): array for name, array in state.items()}
    return state


@pytest.fixture(scope="module")
def small():
    return theirs(SMALL)


@pytest.mark.parametrize(
    "shape, height, width",
    [
        (SMALL, 16, 16),
        (SMALL, 24, 8),
        (STABLE_DIFFUSION, 32, 16),
        (SMALL_16, 16, 24),
        (SD3, 16, 32),
        (ATTENTIVE, 16, 24),
    ],
)
def test_moments_and_images_are_theirs(shape, height, width):
    them = theirs(shape)
    model, params = from_published(arrays(them))
    factor = 2 ** (len(shape["block_out_channels"]) - 1)
    channels = shape.get("latent_channels", 4)
    assert (model.factor, model.latent_channels) == (factor, channels)
    images = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    latents = np.random.default_rng(1).normal(size=(2, height // factor, width // factor, channels))
    latents = latents.astype(np.float32)
    apply = jax.jit(
        lambda params, x, method: model.apply({"params": params}, x, method=method),
        static_argnames="method",
    )
    with torch.no_grad():
        posterior = them.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = them.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2))).sample
    mean, std = apply(params, images, "encode")
    assert relative_error(mean, posterior.mean.numpy().transpose(0, 2, 3, 1)) < 1e-4
    assert relative_error(std, posterior.std.numpy().transpose(0, 2, 3, 1)) < 1e-4
    assert (
        relative_error(apply(params, latents, "decode"), decoded.numpy().transpose(0, 2, 3, 1))
        < 1e-4
    )


def test_vavae_is_the_published_one():
    """f16, attention in the lowest level: the numbers of its published module."""
    numbers = np.load(GOLDEN / "vavae.npz")
    shapes = {
        name: tuple(map(int, shape.split()))
        for name, shape in zip(numbers["names"].tolist(), numbers["shapes"].tolist(), strict=True)
    }
    model, params = from_published(random_arrays(shapes, 3))
    assert (model.factor, model.latent_channels, model.attention_levels) == (16, 8, (4,))
    images, latents = (numbers[name].transpose(0, 2, 3, 1) for name in ("images", "latents"))
    got = dict(zip(("mean", "std"), encoded(model, params, images), strict=True))
    got["decoded"] = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))(latents)
    for name, array in got.items():
        assert relative_error(array, numbers[name].transpose(0, 2, 3, 1)) < 1e-4
    back = to_published(model, params)
    assert from_published(back)[0] == model


def encoded(model, params, images):
    return jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))(images)


@pytest.mark.parametrize("shape", [SMALL_16, ATTENTIVE], ids=["no quant", "attention"])
def test_diffusers_reads_what_is_written(shape, tmp_path):
    """Weights and config.json: the class is made of the config alone."""
    them = theirs(shape)
    model, params = from_published(arrays(them))
    norm = LatentNorm(1.5305, (0.0609,))
    config = config_of(model, norm)
    assert config["scaling_factor"] == 1.5305 and config["shift_factor"] == 0.0609
    again = diffusers.AutoencoderKL.from_config(config)
    state = {name: torch.from_numpy(np.array(a)) for name, a in to_published(model, params).items()}
    again.load_state_dict(state, strict=True)
    assert LatentNorm(**recorded_norm(about_latents(config), model.latent_channels)) == norm
    each = LatentNorm(1.0, tuple(map(float, range(8))), (2.0,) * 8)
    assert LatentNorm(**recorded_norm(config_of_norm(each), 8)) == each


def test_a_norm_and_its_inverse():
    z = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(LatentNorm(0.18215).apply(z), z * np.float32(0.18215))
    np.testing.assert_array_equal(LatentNorm(0.18215).invert(z), z / np.float32(0.18215))
    for norm in (
        LatentNorm(1.5305, (0.0609,)),
        LatentNorm(0.5, (1.0, 2.0, -3.0, 0.5), (1.0, 2.0, 4.0, 8.0)),
    ):
        shift, std = np.array(norm.shift), np.array(norm.std or 1.0)
        np.testing.assert_allclose(
            norm.apply(z), norm.scale * (z - shift) / std, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(norm.invert(norm.apply(z)), z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "latents, message",
    [
        ({"scaling_factor": [1.0]}, r"scaling_factor is \[1.0\]; it must be a positive number"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "it must be a positive number, or 4 in a list"),
        ({"latents_mean": [1.0, 2.0]}, "or 4 in a list, one of each channel"),
        ({"shift_factor": "0.1"}, "shift_factor is 0.1; it must be a number"),
    ],
)
def test_norms_that_cannot_be(latents, message):
    with pytest.raises(UserError, match=message):
        recorded_norm(latents, 4)


@pytest.mark.parametrize("rename", [old_names, compvis_names])
@pytest.mark.parametrize("kind", ["small", "no quant", "attention"])
def test_every_naming_is_read(small, rename, kind):
    shapes = {"no quant": SMALL_16, "attention": ATTENTIVE}
    state = arrays(theirs(shapes[kind]) if kind in shapes else small)
    model, params = from_published(state)
    renamed = rename(state)
    assert set(renamed) != set(state) and is_vae(renamed)
    again, same = from_published(renamed)
    assert again == model
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    whole = {f"first_stage_model.{name}": array for name, array in renamed.items()}
    whole["model.diffusion_model.out.weight"] = np.zeros(3)
    again, _ = from_published(whole)
    assert again == model


def test_there_and_back_every_key_is_bit_equal(small):
    state = arrays(small)
    back = to_published(*from_published(state))
    assert set(back) == set(state)
    for name, array in state.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_stable_diffusions_size():
    shapes = jax.eval_shape(
        lambda: AutoencoderKL().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_other_weights_are_refused_by_name(small):
    state = arrays(small)
    with pytest.raises(UserError, match="missing .* more; unexpected a"):
        from_published({"a": np.zeros(1)})
    fewer = {name: array for name, array in state.items() if "mid_block.attentions" not in name}
    with pytest.raises(UserError, match=r"missing decoder\.mid_block\.attentions\.0\.group_norm"):
        from_published(fewer)
    wrong = {**state, "decoder.conv_out.bias": np.zeros(4, np.float32)}
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias has the shape \[4\]"):
        from_published(wrong)


def test_bfloat16_is_near(small):
    model, params = from_published(arrays(small))
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    exact, half = (
        model.clone(dtype=dtype).apply({"params": params}, latents, method="decode")
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32 and 1e-5 < relative_error(half, exact) < 5e-2
