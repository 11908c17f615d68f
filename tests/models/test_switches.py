"""Each switch of the paper's ablations changes exactly what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.masking import kept_tokens
from mdt_jax.models.mdt import MDT, STACKS, init_params, patchify, unpatchify
from tests.models.common import random_params
from tests.published import relative_error

MODEL = MDT(input_size=(8, 8), in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=3)
V2 = MODEL.clone(version="v2")
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
T, Y = jnp.array([10, 900]), jnp.array([0, 3])
KEEP = jnp.array([[3, 0, 9, 14, 7], [1, 2, 15, 5, 11]])
MASKED = ~kept_tokens(KEEP, None, 16).visible


@functools.cache
def program(model):
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def full_pass(model, params):
    return program(model)(params, X, T, Y)


def masked_pass(model, params, x=X, keep_ids=KEEP, keep_count=None):
    return program(model)(params, x, T, Y, keep_ids, keep_count)


def on_tokens(out, which):
    """The output on the patches of the tokens where `which` [B, L] is true."""
    return np.asarray(patchify(out, 2))[np.asarray(which)]


def without(params, *names):
    return {name: part for name, part in params.items() if name not in names}


def idle_side_blocks(params):
    """The same parameters, but side blocks that hand on what they get."""
    side = params["side_interpolater"]
    idle = {**side, "modulation": jax.tree.map(jnp.zeros_like, side["modulation"])}
    return {**params, "side_interpolater": idle}


@pytest.mark.parametrize("model", [MODEL, V2], ids=["v1", "v2"])
def test_without_side_interpolater_mask_tokens_go_straight_to_the_decoder(model):
    off, params = model.clone(side_layers=0), random_params(model)
    kept = without(params, "side_interpolater")
    assert jax.tree.structure(init_params(off, jax.random.key(0))) == jax.tree.structure(kept)
    np.testing.assert_array_equal(full_pass(off, kept), full_pass(model, params))
    expected = masked_pass(model, idle_side_blocks(params))
    assert relative_error(masked_pass(off, kept), expected) < 2e-6
    assert relative_error(masked_pass(off, kept), masked_pass(model, params)) > 1e-2


def test_without_the_shortcut_kept_tokens_take_the_prediction_too():
    off, params = MODEL.clone(masked_shortcut=False), random_params(MODEL)
    np.testing.assert_array_equal(full_pass(off, params), full_pass(MODEL, params))
    assert relative_error(masked_pass(off, params), masked_pass(MODEL, params)) > 1e-2
    idle = idle_side_blocks(params)
    assert relative_error(masked_pass(off, idle), masked_pass(MODEL, idle)) < 2e-6


@pytest.mark.parametrize("model", [MODEL, V2], ids=["v1", "v2"])
def test_with_symmetric_masking_the_decoder_sees_kept_tokens_only(model):
    symmetric, params = model.clone(asymmetric=False), random_params(model)
    np.testing.assert_array_equal(full_pass(symmetric, params), full_pass(model, params))
    other_mask_token = {**params, "mask_token": jax.random.normal(jax.random.key(1), (16,))}
    kept, again = (
        on_tokens(masked_pass(symmetric, p), ~MASKED) for p in (params, other_mask_token)
    )
    np.testing.assert_array_equal(kept, again)
    kept, other = (on_tokens(masked_pass(model, p), ~MASKED) for p in (params, other_mask_token))
    assert relative_error(other, kept) > 1e-2
    # Masked tokens still are predicted, from the kept ones alone: in v2, too.
    out = masked_pass(symmetric, params)
    assert relative_error(
        on_tokens(masked_pass(symmetric, other_mask_token), MASKED), on_tokens(out, MASKED)
    ) > 1e-2  # fmt: skip
    tokens = patchify(X, 2)
    hidden = unpatchify(jnp.where(MASKED[:, :, None], tokens + 5, tokens), (4, 4), 2)
    np.testing.assert_array_equal(masked_pass(symmetric, params, hidden), out)
    shown = unpatchify(jnp.where(MASKED[:, :, None], tokens, tokens + 5), (4, 4), 2)
    changed = masked_pass(symmetric, params, shown)
    assert relative_error(on_tokens(changed, MASKED), on_tokens(out, MASKED)) > 1e-2


@pytest.mark.parametrize("model", [MODEL, V2], ids=["v1", "v2"])
def test_symmetric_masking_takes_a_bound_and_a_count(model):
    symmetric, params = model.clone(asymmetric=False), random_params(model)
    out = masked_pass(symmetric, params, keep_count=jnp.int32(3))
    expected = masked_pass(symmetric, params, keep_ids=KEEP[:, :3])
    assert relative_error(out, expected) < 2e-6


def test_the_side_interpolater_stands_before_the_decoder():
    """Its position is the number of decoder blocks; the blocks themselves stay the same."""
    params = random_params(MODEL)
    blocks = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), params["encoder"], params["decoder"]
    )
    for decoder_layers in (1, 3):
        model = MODEL.clone(decoder_layers=decoder_layers)
        split = 4 - decoder_layers
        moved = {
            **params,
            "encoder": jax.tree.map(lambda a, n=split: a[:n], blocks),
            "decoder": jax.tree.map(lambda a, n=split: a[n:], blocks),
        }
        shapes = jax.eval_shape(lambda key, model=model: init_params(model, key), jax.random.key(0))
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, moved)
        assert relative_error(masked_pass(model, moved), masked_pass(MODEL, params)) > 1e-2


def test_side_blocks_run_one_after_the_other():
    two = MODEL.clone(side_layers=2)
    params = random_params(two)
    assert params["side_interpolater"]["mlp_in"]["kernel"].shape[0] == 2
    np.testing.assert_array_equal(
        full_pass(two, params), full_pass(MODEL, without(params, "side_interpolater"))
    )
    first = jax.tree.map(lambda a: a[:1], params["side_interpolater"])
    one = {**params, "side_interpolater": first}
    assert relative_error(masked_pass(two, params), masked_pass(MODEL, one)) > 1e-2
    side = params["side_interpolater"]
    idle = jax.tree.map(lambda a: a.at[1].set(0), side["modulation"])
    idle = {**params, "side_interpolater": {**side, "modulation": idle}}
    assert relative_error(masked_pass(two, idle), masked_pass(MODEL, one)) < 2e-6


def test_fixed_positions_are_the_ones_learned_positions_start_from():
    fixed, params = MODEL.clone(learned_position=False), random_params(MODEL)
    rest = without(params, "pos_embed", "decoder_pos_embed")
    assert jax.tree.structure(init_params(fixed, jax.random.key(0))) == jax.tree.structure(rest)
    for run in (full_pass, masked_pass):
        np.testing.assert_array_equal(run(fixed, rest), run(MODEL, params))


def test_without_relative_bias_it_is_zero():
    off, params = MODEL.clone(relative_bias=False), random_params(MODEL)

    def strip(tree):
        return (
            {k: strip(v) for k, v in tree.items() if k != "relative_bias"}
            if isinstance(tree, dict)
            else tree
        )

    bare = strip(params)
    assert jax.tree.structure(init_params(off, jax.random.key(0))) == jax.tree.structure(bare)

    def scaled(factor):
        return jax.tree_util.tree_map_with_path(
            lambda path, a: factor * a if "relative_bias" in str(path) else a, params
        )

    for run in (full_pass, masked_pass):
        assert relative_error(run(off, bare), run(MODEL, scaled(0))) < 2e-6
        assert relative_error(run(off, bare), run(MODEL, scaled(100))) > 1e-2


def test_qk_norm_adds_scales_to_every_attention_and_nothing_else():
    on, key = V2.clone(qk_norm=True), jax.random.key(0)
    params, bare = init_params(on, key), init_params(V2, key)
    stacks = [name for name in bare if name in STACKS]
    for name in stacks:
        for norm in ("query_norm", "key_norm"):
            scale = params[name]["attention"].pop(norm)["scale"]
            np.testing.assert_array_equal(scale, np.ones((len(scale), 8)))
            assert len(scale) == len(bare[name]["attention"]["relative_bias"])
    assert jax.tree.structure(params) == jax.tree.structure(bare)
    jax.tree.map(np.testing.assert_array_equal, params, bare)

    params = random_params(on)
    slopes = jax.jit(jax.grad(lambda p: jnp.square(masked_pass(on, p)).sum()))(params)
    for name in stacks:
        for norm in ("query_norm", "key_norm"):
            assert (np.abs(slopes[name]["attention"][norm]["scale"]) > 0).all(), (name, norm)


def test_a_model_without_decoder_is_a_dit():
    """One stack of blocks: an MDT whose decoder adds no position."""
    params = random_params(MODEL)
    params["decoder_pos_embed"] = jnp.zeros_like(params["decoder_pos_embed"])
    blocks = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), params["encoder"], params["decoder"]
    )
    dit = MODEL.clone(decoder_layers=0)
    one_stack = {
        **without(params, "decoder", "decoder_pos_embed", "side_interpolater", "mask_token"),
        "encoder": blocks,
    }
    shapes = init_params(dit, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(one_stack)
    assert relative_error(full_pass(dit, one_stack), full_pass(MODEL, params)) < 2e-6
    with pytest.raises(ValueError, match="has no masked pass"):
        masked_pass(dit, one_stack)


def test_v2_with_an_odd_encoder_is_refused():
    with pytest.raises(ValueError, match="even number of encoder blocks, got 3"):
        init_params(V2.clone(depth=5), jax.random.key(0))
