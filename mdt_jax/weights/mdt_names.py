"""The published PyTorch names and layouts of MDT's weights, and ours: both ways."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mdt_jax.models.attention import relative_index
from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.torch_files import check_names

# Linear layers of a block and of the rest: published name → ours.
_BLOCK = {
    "attn.qkv": "attention/qkv",
    "attn.proj": "attention/proj",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
    "adaLN_modulation.1": "modulation/linear",
}
_TABLE = "attn.rel_pos_bias.relative_position_bias_table"
DECODER_LAYERS = 2  # of every released v1 model; their files do not tell
_INDEX = "attn.rel_pos_bias.relative_position_index"
_LINEAR = {
    "t_embedder.mlp.0": "timestep_embed/in_proj",
    "t_embedder.mlp.2": "timestep_embed/out_proj",
    "final_layer.linear": "final_layer/linear",
    "final_layer.adaLN_modulation.1": "final_layer/modulation/linear",
}


class _Pair(NamedTuple):
    """A published array and ours; `layer` is the place in a stack of blocks."""

    name: str
    path: str
    layer: int | None = None
    ours: Callable = lambda array: array
    published: Callable = lambda array: array


def _stacks(model: MDT) -> Iterator[tuple[str, int, str, bool]]:
    """(published block, layer of our stack, our stack, whether it has a skip), in file order."""
    encoder = model.depth - model.decoder_layers
    if model.version == "v2":
        for prefix, stack, count, skip in (
            ("en_inblocks", "encoder_in", encoder // 2, False),
            ("en_outblocks", "encoder_out", encoder // 2, True),
            ("de_blocks", "decoder", model.decoder_layers, True),
        ):
            yield from ((f"{prefix}.{i}", i, stack, skip) for i in range(count))
    else:
        yield from ((f"blocks.{i}", i, "encoder", False) for i in range(encoder))
        for i in range(model.decoder_layers):
            yield f"blocks.{encoder + i}", i, "decoder", False
    yield from (
        (f"sideblocks.{i}", i, "side_interpolater", False) for i in range(model.side_layers)
    )


def _pairs(model: MDT) -> Iterator[_Pair]:
    """Every parameter of the published model, in both names and layouts."""
    dim, p, channels = model.hidden_size, model.patch_size, model.in_channels

    def linear(name, path, layer=None):
        yield _Pair(f"{name}.weight", f"{path}/kernel", layer, np.transpose, np.transpose)
        yield _Pair(f"{name}.bias", f"{path}/bias", layer)

    yield _Pair("pos_embed", "pos_embed")
    yield _Pair("decoder_pos_embed", "decoder_pos_embed")
    yield _Pair(
        "mask_token", "mask_token", None, lambda a: a.reshape(dim), lambda a: a.reshape(1, 1, dim)
    )
    yield _Pair(
        "x_embedder.proj.weight",
        "patch_embed/kernel",
        None,
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, dim),
        lambda a: a.reshape(p, p, channels, dim).transpose(3, 2, 0, 1),
    )
    yield _Pair("x_embedder.proj.bias", "patch_embed/bias")
    for name, path in _LINEAR.items():
        yield from linear(name, path)
    if model.num_classes:
        yield _Pair("y_embedder.embedding_table.weight", "label_embed/table/embedding")
    for block, layer, stack, skip in _stacks(model):
        yield _Pair(f"{block}.{_TABLE}", f"{stack}/attention/relative_bias", layer)
        for name, path in (_BLOCK | ({"skip_linear": "skip_linear"} if skip else {})).items():
            yield from linear(f"{block}.{name}", f"{stack}/{path}", layer)


def _count(state: Mapping[str, np.ndarray], prefix: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def model_from_published(state: Mapping[str, np.ndarray], decoder_layers: int | None = None) -> MDT:
    """The model whose parameters a published state_dict holds, v1 or v2.

    decoder_layers: v1's file does not tell it; None means 2, as in every released size. Raises
    UserError, with the first offending names, where names or shapes are not those of an MDT.
    """
    v2 = _count(state, "en_inblocks") > 0
    first = "en_inblocks.0" if v2 else "blocks.0"
    told = {"pos_embed": 3, "x_embedder.proj.weight": 4, f"{first}.{_TABLE}": 2}
    if any(name not in state for name in told):
        check_names(_expected(_template(state)), state, "an MDT")
    for name, axes in told.items():
        if state[name].ndim != axes:
            shape = list(state[name].shape)
            raise UserError(f"{name} has the shape {shape}; an MDT's has {axes} axes")
        if 0 in state[name].shape:
            raise UserError(f"{name} is empty, of the shape {list(state[name].shape)}")
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = state[f"{first}.{_TABLE}"].shape[1]
    if dim % heads or dim % 4:
        raise UserError(f"a width of {dim} with {heads} heads is no MDT's: x_embedder, {_TABLE}")
    if v2:
        decoder = _count(state, "de_blocks")
        depth = 2 * _count(state, "en_inblocks") + decoder
        if decoder_layers not in (None, decoder):
            raise UserError(f"decoder_layers is {decoder_layers}, but the file has {decoder}")
    else:
        decoder = DECODER_LAYERS if decoder_layers is None else decoder_layers
        depth = _count(state, "blocks")
        if not 1 <= decoder < depth:
            raise UserError(f"decoder_layers is {decoder}; it must be 1 to {depth - 1}")
    labels = state.get("y_embedder.embedding_table.weight")
    if labels is not None and (labels.ndim != 2 or len(labels) < 2):
        raise UserError(f"the label table has the shape {list(labels.shape)}; [classes + 1, width]")
    height, width = _grid(state, first)
    model = MDT(
        input_size=(height * patch, width * patch),
        in_channels=channels,
        hidden_size=dim,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        decoder_layers=decoder,
        num_classes=0 if labels is None else len(labels) - 1,
        version="v2" if v2 else "v1",
        side_layers=_count(state, "sideblocks"),
    )
    _check(state, model)
    return model


def _template(state: Mapping[str, np.ndarray]) -> MDT:
    """An MDT with the number of blocks that the names tell, to name what else is missing."""
    half, decoder = _count(state, "en_inblocks"), _count(state, "de_blocks")
    if half and decoder:
        depth, version = 2 * half + decoder, "v2"
    else:
        depth, version, decoder = max(3, _count(state, "blocks")), "v1", 2
    return MDT((32, 32), 4, 64, depth, 4, decoder_layers=decoder, version=version)


def _grid(state: Mapping[str, np.ndarray], block: str) -> tuple[int, int]:
    """(rows, columns) of tokens. Only the index tells how a grid that is not square lies."""
    tokens = state["pos_embed"].shape[1]
    index = state.get(f"{block}.{_INDEX}")
    if index is None or index.dtype.kind not in "iu" or index.shape != (tokens, tokens):
        side = math.isqrt(tokens)
        return side, side
    # Along a row each token's offset from the first is one less; the next row leaves that line.
    steps = np.asarray(index)[0, 0] - np.asarray(index)[0]
    width = next((i for i, step in enumerate(steps) if step != i), tokens)
    return tokens // width, width


def _flat(tree: dict) -> dict[str, Any]:
    """Arrays by path, whose type `flatten_dict` does not tell."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))


def _expected(model: MDT) -> dict[str, tuple[int, ...]]:
    """Shapes of everything the published model of this shape holds."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), keys.key(0))
    flat = _flat(shapes)
    expected = {}
    for pair in _pairs(model):
        shape = flat[pair.path].shape[0 if pair.layer is None else 1 :]
        # An array without memory of its own, to be laid out as the real one would be.
        expected[pair.name] = pair.published(np.broadcast_to(np.float32(0), shape)).shape
    for block, *_ in _stacks(model):
        expected[f"{block}.{_INDEX}"] = (model.num_tokens, model.num_tokens)
    return expected


def _check(state: Mapping[str, np.ndarray], model: MDT) -> None:
    """Raise UserError where names or shapes differ from the published model's."""
    expected = _expected(model)
    if not any(name.endswith(_INDEX) for name in state):  # the parameters alone
        expected = {name: s for name, s in expected.items() if not name.endswith(_INDEX)}
    check_names(expected, state, "an MDT")
    for name, array in state.items():
        if tuple(array.shape) != expected[name]:
            raise UserError(
                f"{name} has the shape {list(array.shape)}; the rest of the file asks for "
                f"{list(expected[name])}"
            )


def params_from_published(state: Mapping[str, np.ndarray], model: MDT) -> dict:
    """The parameters of `model`, from a state_dict that `model_from_published` has accepted."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), keys.key(0))
    flat = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in _flat(shapes).items()}
    for pair in _pairs(model):
        place = flat[pair.path] if pair.layer is None else flat[pair.path][pair.layer]
        place[...] = pair.ours(state[pair.name])
    return unflatten_dict(flat, sep="/")


def published_from_params(model: MDT, params: dict) -> dict[str, np.ndarray]:
    """Every entry of the published model's state_dict: float32, and int64 `…position_index`.

    Fixed positions are written out, and a model without relative bias gets tables of zeros: the
    published code computes the same from them. Raises UserError for what it has no place for.
    """
    for lacks, what in (
        (not model.decoder_layers, "a model without decoder blocks (a DiT)"),
        (not model.side_layers, "a model without a side-interpolater"),
        (not model.num_classes, "an unconditional model"),
    ):
        if lacks:
            raise UserError(f"the published code has no place for {what}")
    flat = _flat(params)
    if not model.learned_position:
        positions = sincos_positions(model.grid, model.hidden_size)[None]
        flat |= {"pos_embed": positions, "decoder_pos_embed": positions}
    state = {}
    for pair in _pairs(model):
        if pair.path.endswith("relative_bias") and not model.relative_bias:
            rows = (2 * model.grid[0] - 1) * (2 * model.grid[1] - 1) + 3
            array = np.zeros((rows, model.num_heads), np.float32)
        else:
            array = np.asarray(
                flat[pair.path] if pair.layer is None else flat[pair.path][pair.layer]
            )
        state[pair.name] = np.ascontiguousarray(pair.published(array))
    index = relative_index(model.grid).astype(np.int64)
    for block, *_ in _stacks(model):
        state[f"{block}.{_INDEX}"] = index
    return state
