"""The VAE against diffusers' own, with random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.vae_names import from_published, is_vae, to_published
from tests.published import relative_error

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


def theirs(shape):
    """diffusers' network; norms and biases random, too."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**shape, latent_channels=4).eval()
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
    "shape, height, width", [(SMALL, 16, 16), (SMALL, 24, 8), (STABLE_DIFFUSION, 32, 16)]
)
def test_moments_and_images_are_theirs(shape, height, width):
    them = theirs(shape)
    model, params = from_published(arrays(them))
    factor = 2 ** (len(shape["block_out_channels"]) - 1)
    assert model.factor == factor
    images = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    latents = np.random.default_rng(1).normal(size=(2, height // factor, width // factor, 4))
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


@pytest.mark.parametrize("rename", [old_names, compvis_names])
def test_every_naming_is_read(small, rename):
    state = arrays(small)
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
