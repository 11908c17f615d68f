import jax
import numpy as np
import pytest

from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.mdt_names import (
    model_from_published,
    params_from_published,
    to_published,
)
from tests.models.common import apply, random_params
from tests.published import MODELS, VERSIONS, published_params, published_state, relative_error

TABLE = "blocks.0.attn.rel_pos_bias.relative_position_bias_table"
INDEX = "blocks.0.attn.rel_pos_bias.relative_position_index"
SMALL = dict(in_channels=3, hidden_size=16, depth=5, num_heads=2, num_classes=4)


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_a_file_tells_is_inferred(version):
    assert model_from_published(published_state(f"{version}_state")) == MODELS[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_there_and_back_every_key_is_bit_equal(version):
    state, model = published_state(f"{version}_state"), MODELS[version]
    back = to_published(model, params_from_published(state, model))
    assert set(back) == set(state)
    for name, array in state.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    "fields",
    [
        dict(input_size=(8, 8)),
        dict(input_size=(8, 12)),
        dict(input_size=(12, 4)),
        dict(input_size=(4, 16), version="v2", decoder_layers=1),
        dict(input_size=(16, 16), patch_size=4, version="v2", decoder_layers=3, side_layers=2),
        dict(input_size=(8, 8), decoder_layers=4),
    ],
)
def test_any_shape_comes_back(fields):
    model = MDT(**SMALL, **fields)
    params = random_params(model)
    state = to_published(model, params)
    given = None if model.version == "v2" else model.decoder_layers
    found = model_from_published(state, given)
    assert found == model
    assert relative_error(params_from_published(state, found), params) == 0


def test_fixed_positions_and_no_bias_are_written_out():
    bare = MDT(**SMALL, input_size=(8, 8), learned_position=False, relative_bias=False)
    params = random_params(bare)
    state = to_published(bare, params)
    model = model_from_published(state)
    assert model.learned_position and model.relative_bias
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    t, y = np.array([3, 700]), np.array([0, 4])
    out = apply(bare, params, x, t, y)
    same = apply(model, params_from_published(state, model), x, t, y)
    assert relative_error(same, out) < 2e-6


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(decoder_layers=0), "no place for a DiT with a relative position bias"),
        (dict(learn_sigma=False), "no place for an MDT that predicts no variance"),
        (dict(side_layers=0), "no place for a model without a side-interpolater"),
        (dict(num_classes=0), "no place for an unconditional model"),
        (dict(qk_norm=True), "no place for a model that normalises queries and keys"),
    ],
)
def test_what_the_published_code_cannot_hold(fields, message):
    model = MDT(**{**SMALL, **fields}, input_size=(8, 8))
    with pytest.raises(UserError, match=message):
        to_published(model, random_params(model))


def test_other_weights_are_refused_by_name():
    state = published_state("v1_state")
    with pytest.raises(UserError, match="missing pos_embed, .* and 59 more; unexpected a, b$"):
        model_from_published({"a": np.zeros(1), "b": np.zeros(1)})
    dit = {n: a for n, a in state.items() if "rel_pos" not in n and "sideblocks" not in n}
    dit = {n: a for n, a in dit.items() if n not in ("decoder_pos_embed", "mask_token")}
    with pytest.raises(UserError, match="missing decoder_pos_embed, blocks.0.attn.rel"):
        model_from_published({**dit, "mask_token": state["mask_token"]})
    fewer = {name: array for name, array in state.items() if "blocks.1.mlp" not in name}
    with pytest.raises(UserError, match=r"missing blocks\.1\.mlp\.fc1\.weight, .* and 1 more"):
        model_from_published(fewer)
    with pytest.raises(UserError, match="unexpected head.weight"):
        model_from_published({**state, "head.weight": np.zeros(3)})
    wrong = {**state, "blocks.2.mlp.fc1.bias": np.zeros(7)}
    with pytest.raises(
        UserError, match=r"blocks\.2\.mlp\.fc1\.bias has the shape \[7\], not \[128\]"
    ):
        model_from_published(wrong)
    with pytest.raises(UserError, match="decoder_layers is 4; it must be 1 to 3"):
        model_from_published(state, decoder_layers=4)
    with pytest.raises(UserError, match="decoder_layers is 3, but the file has 2"):
        model_from_published(published_state("v2_state"), decoder_layers=3)


def test_parameters_without_index_buffers_are_enough():
    state = {k: v for k, v in published_state("v1_state").items() if not k.endswith("index")}
    model = model_from_published(state)
    assert relative_error(params_from_published(state, model), published_params("v1_state")) == 0


@pytest.mark.parametrize(
    "name, array, message",
    [
        (TABLE, np.zeros((52, 3)), "a width of 32 with 3 heads is no MDT's"),
        (TABLE, np.zeros((52, 0)), "is empty"),
        ("pos_embed", np.zeros((16, 32)), "pos_embed has the shape .16, 32.; an MDT's has 3 axes"),
        ("y_embedder.embedding_table.weight", np.zeros(3), "the label table has the shape .3."),
        ("mask_token", np.zeros(()), "mask_token has the shape .., not .1, 1, 32."),
        (INDEX, np.zeros(3, np.int64), "position_index has the shape .3."),
    ],
)
def test_shapes_that_do_not_fit(name, array, message):
    with pytest.raises(UserError, match=message):
        model_from_published({**published_state("v1_state"), name: array})
