import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.guidance import power_cosine
from mdt_jax.models import masking
from mdt_jax.models.attention import relative_index
from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.mdt import MDT, init_params, patchify, unpatchify
from tests.conftest import FULL_COMPILE
from tests.models.common import apply, random_params
from tests.published import (
    MODELS,
    VERSIONS,
    guided_network,
    published_numbers,
    published_params,
    relative_error,
)

SMALL = dict(hidden_size=16, depth=4, num_heads=2, num_classes=3)


def golden_inputs(version):
    return [jnp.asarray(published_numbers(version)[f"fwd_{name}"]) for name in "xty"]


def golden_keep_ids(version):
    golden = published_numbers(version)
    length = masking.keep_length(64, float(golden["mask_ratio"]))
    assert length == golden["mask_len_keep"]
    return masking.keep_ids(jnp.asarray(golden["mask_noise"]), length)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("unroll", [False, True])
def test_forward_is_the_published_one(unroll, version):
    model, params = MODELS[version].clone(unroll=unroll), published_params(f"{version}_state")
    out = apply(model, params, *golden_inputs(version), compiler_options=FULL_COMPILE)
    assert relative_error(out, published_numbers(version)["fwd_out"]) < 2e-6


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_masked_forward_is_the_published_one(remat, version):
    inputs = [*golden_inputs(version), golden_keep_ids(version)]
    model, params = MODELS[version].clone(remat=remat), published_params(f"{version}_state")
    out = apply(model, params, *inputs, compiler_options=FULL_COMPILE)
    assert relative_error(out, published_numbers(version)["mask_out"]) < 2e-6


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bound", [45, 64])
def test_a_bound_and_a_traced_count_are_the_exact_length(bound, version):
    """The same numbers, whatever the encoder is padded to: one program for every ratio drawn."""
    golden = published_numbers(version)
    keep_ids = masking.keep_ids(jnp.asarray(golden["mask_noise"]), bound)
    inputs = [*golden_inputs(version), keep_ids, jnp.int32(golden["mask_len_keep"])]
    params = published_params(f"{version}_state")
    out = apply(MODELS[version], params, *inputs, compiler_options=FULL_COMPILE)
    assert relative_error(out, golden["mask_out"]) < 2e-6


@pytest.mark.parametrize("version", VERSIONS)
def test_guided_forward_is_the_published_one(version):
    golden, params, batch = published_numbers(version), published_params(f"{version}_state"), 3
    x, t, y = (jnp.asarray(golden[f"cfg_{name}"]) for name in "xty")

    def guided(x, t, y):
        def network(x, t, y):
            return MODELS[version].apply({"params": params}, x, t, y)

        scale, power = float(golden["cfg_scale"]), float(golden["cfg_power"])
        return guided_network(network, y, 10, lambda t: power_cosine(t, scale, power))(x, t)

    out = jax.jit(guided, compiler_options=FULL_COMPILE)(x[:batch], t[:batch], y[:batch])
    assert relative_error(out, golden["cfg_out"][:batch]) < 2e-6


def test_output_is_zero_at_initialisation():
    model = MDT(input_size=(8, 8), in_channels=4, **SMALL)
    params = init_params(model, jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 4))
    t, y = jnp.array([3, 999]), jnp.array([0, 3])
    for keep in (None, jnp.tile(jnp.arange(11), (2, 1))):
        out = apply(model, params, x, t, y, keep)
        assert out.shape == (2, 8, 8, 8)
        assert np.all(out == 0)


def test_initialisation():
    model = MDT(input_size=(32, 32), in_channels=4, hidden_size=64, depth=4, num_heads=4)
    params = init_params(model, jax.random.key(0))
    block = params["encoder"]
    limit = np.sqrt(6 / (64 + 3 * 64))  # the fused qkv matrix, Xavier-uniform
    for layer in range(2):
        qkv = np.asarray(block["attention"]["qkv"]["kernel"][layer])
        assert 0.97 * limit < np.abs(qkv).max() <= limit
    patch = np.asarray(params["patch_embed"]["kernel"])
    assert 0.95 < np.abs(patch).max() / np.sqrt(6 / (64 + 16)) <= 1
    for table in (
        params["label_embed"]["table"]["embedding"],
        params["timestep_embed"]["in_proj"]["kernel"],
        params["timestep_embed"]["out_proj"]["kernel"],
        params["mask_token"],
    ):
        assert np.std(table) == pytest.approx(0.02, rel=0.4 if table.ndim == 1 else 0.05)
    bias = np.asarray(block["attention"]["relative_bias"])
    assert bias.std() == pytest.approx(0.02, rel=0.05)
    assert bias.shape == (2, 31 * 31 + 3, 4)
    assert not np.any(block["modulation"]["linear"]["kernel"])
    assert not np.array_equal(bias[0], bias[1]), "layers of a stack must differ"
    np.testing.assert_array_equal(params["pos_embed"], params["decoder_pos_embed"])


@pytest.mark.parametrize("version", VERSIONS)
def test_masked_tokens_reach_the_output_in_v2_only(version):
    keep = golden_keep_ids(version)
    x, t, y = golden_inputs(version)
    hidden = ~masking.kept_tokens(keep, None, 64).visible[:, :, None]
    tokens = patchify(x, 2)
    changed = unpatchify(jnp.where(hidden, tokens * 3 + 7, tokens), (8, 8), 2)
    assert not np.array_equal(x, changed)
    model, params = MODELS[version], published_params(f"{version}_state")
    out, other = (apply(model, params, image, t, y, keep) for image in (x, changed))
    if version == "v1":
        np.testing.assert_array_equal(out, other)
    else:
        assert relative_error(other, out) > 1e-2
    shown = unpatchify(jnp.where(hidden, tokens, tokens * 3 + 7), (8, 8), 2)
    assert relative_error(apply(model, params, shown, t, y, keep), out) > 1e-2


@pytest.mark.parametrize(
    "size, patch, channels, classes",
    [((8, 8), 2, 1, 10), ((8, 16), 4, 3, 5), ((12, 6), 3, 4, 0), ((7, 5), 1, 2, 1)],
)
def test_any_shape(size, patch, channels, classes):
    model = MDT(
        input_size=size,
        in_channels=channels,
        patch_size=patch,
        **{**SMALL, "num_classes": classes},
    )
    params = random_params(model)
    x = jax.random.normal(jax.random.key(0), (2, *size, channels))
    y = jnp.array([0, classes]) if classes else None
    keep = jnp.argsort(jax.random.uniform(jax.random.key(1), (2, model.num_tokens)))[:, :3]
    for keep_ids in (None, keep):
        out = apply(model, params, x, jnp.array([0, 5]), y, keep_ids)
        assert out.shape == (2, *size, 2 * channels)
        assert np.std(out) > 0
    assert ("label_embed" in params) == bool(classes)


def test_keeping_every_token_still_is_the_full_pass():
    """With nothing masked, the shortcut takes the encoder's tokens and the passes agree."""
    model = MDT(input_size=(8, 8), in_channels=1, **SMALL)
    params = random_params(model)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    t, y = jnp.array([10, 900]), jnp.array([0, 2])
    everything = jnp.stack([jnp.arange(16), jnp.arange(16)[::-1]])
    full = apply(model, params, x, t, y)
    assert relative_error(apply(model, params, x, t, y, everything), full) < 2e-6


def test_bfloat16_moves_only_the_computation():
    model = MDT(input_size=(8, 8), in_channels=1, **SMALL)
    params = random_params(model)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    t, y = jnp.array([0, 10, 500, 999]), jnp.array([0, 1, 2, 3])
    half = model.clone(dtype=jnp.bfloat16)
    assert all(
        a.dtype == jnp.float32 for a in jax.tree.leaves(init_params(half, jax.random.key(0)))
    )
    out, exact = apply(half, params, x, t, y), apply(model, params, x, t, y)
    assert out.dtype == jnp.float32
    assert 1e-5 < relative_error(out, exact) < 3e-2


def test_relative_index():
    index = relative_index((16, 16))
    places = {(0, 0): 480, (0, 1): 479, (1, 0): 481, (0, 16): 449, (16, 0): 511}
    assert {place: index[place] for place in places} == places
    wide = relative_index((2, 3))
    assert wide.min() == 0 and wide.max() == 3 * 5 - 1


def test_positions_encode_x_first():
    positions = sincos_positions((2, 3), 8).reshape(2, 3, 8)
    np.testing.assert_array_equal(positions[0, :, :4], positions[1, :, :4])  # x: same in each row
    np.testing.assert_array_equal(positions[:, 0, 4:], positions[:, 2, 4:])
    np.testing.assert_allclose(
        positions[1, 2, [0, 2, 4, 6]],
        np.sin([2, 0, 1, 0]) + [0, np.cos(2), 0, np.cos(1)],
        rtol=1e-6,
    )


def test_patches_hold_channels_last():
    image = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    tokens = patchify(image, 2)
    np.testing.assert_array_equal(tokens[0, 1, :6], image[0, 0, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, (2, 2), 2), image)
