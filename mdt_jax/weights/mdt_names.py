"""Weights of the published PyTorch MDT: names and layouts of its arrays, and ours."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from mdt_jax.models.attention import relative_index
from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import state_dicts

DECODER_LAYERS = 2  # of every released v1 model; their files do not record it
# Linear layers of a block and of the rest: published name → ours.
_BLOCK = {
    "attn.qkv": "attention/qkv",
    "attn.proj": "attention/proj",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
    "adaLN_modulation.1": "modulation/linear",
}
_LINEAR = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "timestep_embed/in_proj",
    "t_embedder.mlp.2": "timestep_embed/out_proj",
    "final_layer.linear": "final_layer/linear",
    "final_layer.adaLN_modulation.1": "final_layer/modulation/linear",
}
_TABLE = "attn.rel_pos_bias.relative_position_bias_table"
_INDEX = "attn.rel_pos_bias.relative_position_index"
_LABELS = "y_embedder.embedding_table.weight"


class _Pair(NamedTuple):
    """A published array and its place in our tree; layer: its index in a stack of blocks."""

    name: str
    path: str
    layer: int | None = None

    def of(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Our array, a view of the stack that it is in."""
        stack = leaves[self.path]
        return stack if self.layer is None else stack[self.layer]


def shapes(model: MDT) -> dict:
    """The parameters of `model` as shapes, float32."""
    return jax.eval_shape(lambda key: init_params(model, key), keys.key(0))


def _blocks(model: MDT) -> Iterator[tuple[str, str, int, bool]]:
    """(published block, our stack, layer in the stack, whether it has a skip), in file order."""
    decoder = model.decoder_layers
    encoder = model.depth - decoder
    stacks = [  # (prefix, number of the first block, our stack, number of blocks, skip)
        ("blocks", 0, "encoder", encoder, False),
        ("blocks", encoder, "decoder", decoder, False),
    ]
    if model.version == "v2":
        stacks = [
            ("en_inblocks", 0, "encoder_in", encoder // 2, False),
            ("en_outblocks", 0, "encoder_out", encoder // 2, True),
            ("de_blocks", 0, "decoder", decoder, True),
        ]
    stacks.append(("sideblocks", 0, "side_interpolater", model.side_layers, False))
    for prefix, first, stack, count, skip in stacks:
        for layer in range(count):
            yield f"{prefix}.{first + layer}", stack, layer, skip


def _pairs(model: MDT) -> Iterator[_Pair]:
    """Every parameter of the published model."""
    for name in ("pos_embed", "decoder_pos_embed", "mask_token"):
        yield _Pair(name, name)
    for name, path in _LINEAR.items():
        yield from _linear(name, path)
    if model.num_classes:
        yield _Pair(_LABELS, "label_embed/table/embedding")
    for block, stack, layer, skip in _blocks(model):
        yield _Pair(f"{block}.{_TABLE}", f"{stack}/attention/relative_bias", layer)
        for name, path in _BLOCK.items():
            yield from _linear(f"{block}.{name}", f"{stack}/{path}", layer)
        if skip:
            yield from _linear(f"{block}.skip_linear", f"{stack}/skip_linear", layer)


def _linear(name: str, path: str, layer: int | None = None) -> Iterator[_Pair]:
    yield _Pair(f"{name}.weight", f"{path}/kernel", layer)
    yield _Pair(f"{name}.bias", f"{path}/bias", layer)


def _our_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A published array as ours."""
    if path == "patch_embed/kernel":  # [dim, channels, p, p] → [p·p·channels, dim]
        return array.transpose(2, 3, 1, 0).reshape(-1, len(array))
    if path == "mask_token":
        return array.reshape(-1)
    return array.T if path.endswith("kernel") else array


def _published_layout(path: str, array: np.ndarray, model: MDT) -> np.ndarray:
    """The inverse of `_our_layout`."""
    if path == "patch_embed/kernel":
        p = model.patch_size
        return array.reshape(p, p, model.in_channels, -1).transpose(3, 2, 0, 1)
    if path == "mask_token":
        return array.reshape(1, 1, -1)
    return array.T if path.endswith("kernel") else array


def _count(state: Mapping[str, np.ndarray], prefix: str) -> int:
    """How many blocks of a prefix a state_dict has."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def model_from_published(state: Mapping[str, np.ndarray], decoder_layers: int | None = None) -> MDT:
    """The model whose parameters a published state_dict holds, v1 or v2.

    decoder_layers: of MDT v1, whose files do not record it; None means 2, as in every released
    size. Raises UserError, with the first offending names, where names or shapes are not an MDT's.
    """
    v2 = _count(state, "en_inblocks") > 0
    first = "en_inblocks.0" if v2 else "blocks.0"
    _check_sizes(state, first)
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = state[f"{first}.{_TABLE}"].shape[1]
    if dim % heads or dim % 4:
        raise UserError(f"a width of {dim} with {heads} heads is no MDT's: x_embedder, {_TABLE}")
    depth, decoder = _depth(state, decoder_layers, v2)
    labels = state.get(_LABELS)
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
    expected = _expected(model)
    if not any(name.endswith(_INDEX) for name in state):  # a file may leave the buffers out
        expected = {n: shape for n, shape in expected.items() if not n.endswith(_INDEX)}
    state_dicts.check(state, expected, "an MDT")
    return model


def _check_sizes(state: Mapping[str, np.ndarray], block: str) -> None:
    """Raise UserError where the arrays that tell a model's sizes are missing or have other axes."""
    axes = {"pos_embed": 3, "x_embedder.proj.weight": 4, f"{block}.{_TABLE}": 2}
    if any(name not in state for name in axes):
        state_dicts.check(state, _expected(_template(state)), "an MDT")
    for name, count in axes.items():
        shape = list(state[name].shape)
        if len(shape) != count:
            raise UserError(f"{name} has the shape {shape}; an MDT's has {count} axes")
        if 0 in shape:
            raise UserError(f"{name} is empty, of the shape {shape}")


def _template(state: Mapping[str, np.ndarray]) -> MDT:
    """An MDT with as many blocks as the names have, to name what else is missing."""
    half, decoder = _count(state, "en_inblocks"), _count(state, "de_blocks")
    if half and decoder:
        return MDT((32, 32), 4, 64, 2 * half + decoder, 4, decoder_layers=decoder, version="v2")
    return MDT((32, 32), 4, 64, max(3, _count(state, "blocks")), 4, decoder_layers=2)


def _depth(
    state: Mapping[str, np.ndarray], decoder_layers: int | None, v2: bool
) -> tuple[int, int]:
    """(number of blocks, how many of them decode), the side-interpolater's left out."""
    if v2:
        decoder = _count(state, "de_blocks")
        if decoder_layers not in (None, decoder):
            raise UserError(f"decoder_layers is {decoder_layers}, but the file has {decoder}")
        return 2 * _count(state, "en_inblocks") + decoder, decoder
    decoder = DECODER_LAYERS if decoder_layers is None else decoder_layers
    depth = _count(state, "blocks")
    if not 1 <= decoder < depth:
        raise UserError(f"decoder_layers is {decoder}; it must be 1 to {depth - 1}")
    return depth, decoder


def _grid(state: Mapping[str, np.ndarray], block: str) -> tuple[int, int]:
    """(rows, columns) of tokens. Only the index tells the proportions of a grid.

    Without one the grid is square.
    """
    tokens = state["pos_embed"].shape[1]
    index = state.get(f"{block}.{_INDEX}")
    if index is None or index.dtype.kind not in "iu" or index.shape != (tokens, tokens):
        side = math.isqrt(tokens)
        return side, side
    # Along a row each token's offset from the first is one less; the next row breaks the sequence.
    steps = np.asarray(index)[0, 0] - np.asarray(index)[0]
    width = next((i for i, step in enumerate(steps) if step != i), tokens)
    return tokens // width, width


def _expected(model: MDT) -> dict[str, tuple[int, ...]]:
    """Shapes of everything in the published model's state_dict, by name."""
    leaves = {
        path: np.broadcast_to(np.float32(0), leaf.shape)  # without memory of its own
        for path, leaf in state_dicts.flat(shapes(model)).items()
    }
    expected = {
        pair.name: _published_layout(pair.path, pair.of(leaves), model).shape
        for pair in _pairs(model)
    }
    for block, *_ in _blocks(model):
        expected[f"{block}.{_INDEX}"] = (model.num_tokens, model.num_tokens)
    return expected


def params_from_published(state: Mapping[str, np.ndarray], model: MDT) -> dict:
    """The parameters of `model`, from a state_dict that `model_from_published` has accepted.

    What `model` does not learn, as fixed positions, is left out.
    """
    leaves = {
        path: np.empty(leaf.shape, leaf.dtype)
        for path, leaf in state_dicts.flat(shapes(model)).items()
    }
    for pair in _pairs(model):
        if pair.path in leaves:
            pair.of(leaves)[...] = _our_layout(pair.path, state[pair.name])
    return unflatten_dict(leaves, sep="/")


def from_published(
    state: Mapping[str, np.ndarray], decoder_layers: int | None = None
) -> tuple[MDT, dict]:
    """(network, float32 parameters) of a state_dict; arguments as of `model_from_published`."""
    model = model_from_published(state, decoder_layers)
    return model, params_from_published(state, model)


def to_published(model: MDT, params: dict) -> dict[str, np.ndarray]:
    """Every entry of the published model's state_dict: float32, and int64 `…position_index`.

    Fixed positions are written out, and a model without relative bias gets tables of zeros: the
    published code computes the same from them. Raises UserError for a model that the published
    code cannot represent.
    """
    for lacks, kind in (
        (not model.decoder_layers, "a model without decoder blocks (a DiT)"),
        (not model.side_layers, "a model without a side-interpolater"),
        (not model.num_classes, "an unconditional model"),
    ):
        if lacks:
            raise UserError(f"the published code has no place for {kind}")
    leaves = state_dicts.flat(params)
    if not model.learned_position:
        positions = sincos_positions(model.grid, model.hidden_size)[None]
        leaves |= {"pos_embed": positions, "decoder_pos_embed": positions}
    rows, columns = model.grid
    no_bias = np.zeros(((2 * rows - 1) * (2 * columns - 1) + 3, model.num_heads), np.float32)
    state = {}
    for pair in _pairs(model):
        if pair.name.endswith(_TABLE) and not model.relative_bias:
            array = no_bias
        else:
            array = _published_layout(pair.path, np.asarray(pair.of(leaves)), model)
        state[pair.name] = np.ascontiguousarray(array)
    index = relative_index(model.grid).astype(np.int64)
    for block, *_ in _blocks(model):
        state[f"{block}.{_INDEX}"] = index
    return state
