"""Weights of the published PyTorch MDT, DiT and SiT: names and layouts of their arrays, and ours.

A DiT has the names of an MDT without those of decoder, bias tables and mask token; a SiT has those
of a DiT.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from mdt_jax.models.attention import relative_index
from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.mdt import MDT, SIZES, init_params
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import state_dicts

DECODER_LAYERS = 2  # of every released v1 model; their files do not record it
HEAD = 64  # channels of a head in every released size of DiT but XL; their files do not record it
_HEADS: dict[int, int] = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
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
_OUTPUT = "final_layer.linear.weight"


class Pair(NamedTuple):
    """A published array and its place in our tree.

    layer: its index in a stack of blocks. third: which third of our array's columns it is: of
    queries, keys and values, where they are three linear layers.
    """

    name: str
    path: str
    layer: int | None = None
    third: int | None = None

    def of(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Our array, a view of the stack that it is in."""
        stack = leaves[self.path]
        array = stack if self.layer is None else stack[self.layer]
        return array if self.third is None else np.split(array, 3, axis=-1)[self.third]


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
    if decoder:  # a DiT has no masked pass, and so no side-interpolater, whatever its field says
        stacks.append(("sideblocks", 0, "side_interpolater", model.side_layers, False))
    for prefix, first, stack, count, skip in stacks:
        for layer in range(count):
            yield f"{prefix}.{first + layer}", stack, layer, skip


def _pairs(model: MDT) -> Iterator[Pair]:
    """Every parameter of the published model."""
    yield Pair("pos_embed", "pos_embed")
    if model.decoder_layers:
        yield Pair("decoder_pos_embed", "decoder_pos_embed")
        yield Pair("mask_token", "mask_token")
    for name, path in _LINEAR.items():
        yield from linear(name, path)
    if model.num_classes:
        yield Pair(_LABELS, "label_embed/table/embedding")
    for block, stack, layer, skip in _blocks(model):
        if model.decoder_layers:
            yield Pair(f"{block}.{_TABLE}", f"{stack}/attention/relative_bias", layer)
        for name, path in _BLOCK.items():
            yield from linear(f"{block}.{name}", f"{stack}/{path}", layer)
        if skip:
            yield from linear(f"{block}.skip_linear", f"{stack}/skip_linear", layer)


def linear(
    name: str, path: str, layer: int | None = None, third: int | None = None
) -> Iterator[Pair]:
    """The weight and the bias of a linear layer."""
    yield Pair(f"{name}.weight", f"{path}/kernel", layer, third)
    yield Pair(f"{name}.bias", f"{path}/bias", layer, third)


def our_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A published array as ours."""
    if path == "patch_embed/kernel":  # [dim, channels, p, p] → [p·p·channels, dim]
        return array.transpose(2, 3, 1, 0).reshape(-1, len(array))
    if path == "mask_token":
        return array.reshape(-1)
    return array.T if path.endswith("kernel") else array


def published_layout(path: str, array: np.ndarray, model: MDT) -> np.ndarray:
    """The inverse of `our_layout`."""
    if path == "patch_embed/kernel":
        p = model.patch_size
        return array.reshape(p, p, model.in_channels, -1).transpose(3, 2, 0, 1)
    if path == "mask_token":
        return array.reshape(1, 1, -1)
    return array.T if path.endswith("kernel") else array


def _count(state: Mapping[str, np.ndarray], prefix: str) -> int:
    """How many blocks of a prefix a state_dict has."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def is_dit(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state_dict has the names of a DiT or SiT."""
    of_mdt = (_TABLE, "decoder_pos_embed", "mask_token")
    return "blocks.0.attn.qkv.weight" in state and not any(n.endswith(of_mdt) for n in state)


def model_from_published(
    state: Mapping[str, np.ndarray],
    decoder_layers: int | None = None,
    num_heads: int | None = None,
) -> MDT:
    """The model whose parameters a published state_dict holds: an MDT v1 or v2, or a DiT.

    decoder_layers: of MDT v1, whose files do not record it; None means 2, as in every released
    size. num_heads: of a DiT or SiT, whose files do not record it; None means that of the released
    size of this width, or one for 64 channels. Raises UserError, with the first offending names,
    where names or shapes are not such a model's.
    """
    if is_dit(state):
        if decoder_layers is not None:
            raise UserError("decoder_layers is for MDT; this is a DiT")
        return _dit_from_published(state, num_heads)
    v2 = _count(state, "en_inblocks") > 0
    first = "en_inblocks.0" if v2 else "blocks.0"
    _check_sizes(state, {"pos_embed": 3, "x_embedder.proj.weight": 4, f"{first}.{_TABLE}": 2})
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = state[f"{first}.{_TABLE}"].shape[1]
    if dim % heads or dim % 4:
        raise UserError(f"a width of {dim} with {heads} heads is no MDT's: x_embedder, {_TABLE}")
    if num_heads not in (None, heads):
        raise UserError(f"num_heads is {num_heads}, but the file has {heads}")
    depth, decoder = _depth(state, decoder_layers, v2)
    height, width = _grid(state, first)
    model = MDT(
        input_size=(height * patch, width * patch),
        in_channels=channels,
        hidden_size=dim,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        decoder_layers=decoder,
        num_classes=_classes(state),
        version="v2" if v2 else "v1",
        side_layers=_count(state, "sideblocks"),
    )
    expected = _expected(model)
    if not any(name.endswith(_INDEX) for name in state):  # a file may leave the buffers out
        expected = {n: shape for n, shape in expected.items() if not n.endswith(_INDEX)}
    state_dicts.check(state, expected, "an MDT")
    return model


def _dit_from_published(state: Mapping[str, np.ndarray], num_heads: int | None) -> MDT:
    """The DiT or SiT of a state_dict; as of `model_from_published`."""
    _check_sizes(state, {"pos_embed": 3, "x_embedder.proj.weight": 4, _OUTPUT: 2})
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = heads_of(dim) if num_heads is None else num_heads
    unknown = num_heads is None and dim not in _HEADS and dim % HEAD
    if unknown or heads < 1 or dim % heads or dim % 4:
        raise UserError(
            "a DiT's file does not record its number of heads; "
            + ("say num_heads for" if num_heads is None else f"num_heads={heads} does not divide")
            + f" its width of {dim}"
        )
    height, width = _grid(state, "blocks.0")
    model = dit(
        input_size=(height * patch, width * patch),
        in_channels=channels,
        hidden_size=dim,
        depth=_count(state, "blocks"),
        num_heads=heads,
        patch_size=patch,
        num_classes=_classes(state),
        learn_sigma=len(state[_OUTPUT]) != channels * patch**2,
    )
    fixed = sincos_positions(model.grid, dim)[None]
    is_fixed = np.array_equal(state["pos_embed"].astype(np.float32), fixed)
    model = model.clone(learned_position=not is_fixed)
    state_dicts.check(state, _expected(model), "a DiT")
    return model


def heads_of(hidden_size: int) -> int:
    """The heads of a DiT of this width, if its file is not said to have others."""
    return _HEADS.get(hidden_size) or hidden_size // HEAD


def dit(**fields: Any) -> MDT:
    """A DiT, which is an MDT without decoder, side-interpolater and relative position bias.

    fields: those of MDT. The position embedding is fixed unless they say otherwise.
    """
    none = {"decoder_layers": 0, "side_layers": 0, "relative_bias": False}
    return MDT(**{"learned_position": False, **none, **fields})


def _classes(state: Mapping[str, np.ndarray]) -> int:
    """The number of classes, without the null label; 0: of an unconditional model."""
    labels = state.get(_LABELS)
    if labels is None:
        return 0
    if labels.ndim != 2 or len(labels) < 2:
        raise UserError(f"the label table has the shape {list(labels.shape)}; [classes + 1, width]")
    return len(labels) - 1


def _check_sizes(state: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> None:
    """Raise UserError where the arrays that tell a model's sizes are missing or have other axes.

    axes: how many each has.
    """
    kind = "a DiT" if is_dit(state) else "an MDT"
    if any(name not in state for name in axes):
        state_dicts.check(state, _expected(_template(state)), kind)
    for name, count in axes.items():
        shape = list(state[name].shape)
        if len(shape) != count:
            raise UserError(f"{name} has the shape {shape}; {kind}'s has {count} axes")
        if 0 in shape:
            raise UserError(f"{name} is empty, of the shape {shape}")


def _template(state: Mapping[str, np.ndarray]) -> MDT:
    """A model with as many blocks as the names have, to name what else is missing."""
    if is_dit(state):
        return dit(
            input_size=(32, 32), in_channels=4, hidden_size=64, num_heads=4,
            depth=_count(state, "blocks"), num_classes=_classes(state),
        )  # fmt: skip
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
    fixed = np.broadcast_to(np.float32(0), (1, model.num_tokens, model.hidden_size))
    leaves = {"pos_embed": fixed, **leaves}
    expected = {
        pair.name: published_layout(pair.path, pair.of(leaves), model).shape
        for pair in _pairs(model)
    }
    if not model.decoder_layers:
        return expected
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
        if pair.path in leaves:  # fixed positions and the tables of a model without bias are not
            pair.of(leaves)[...] = our_layout(pair.path, state[pair.name])
    return unflatten_dict(leaves, sep="/")


def from_published(
    state: Mapping[str, np.ndarray],
    decoder_layers: int | None = None,
    num_heads: int | None = None,
) -> tuple[MDT, dict]:
    """(network, float32 parameters) of a state_dict; arguments as of `model_from_published`."""
    model = model_from_published(state, decoder_layers, num_heads)
    return model, params_from_published(state, model)


def to_published(model: MDT, params: dict) -> dict[str, np.ndarray]:
    """Every entry of the published model's state_dict: float32, and int64 `…position_index`.

    Fixed positions are written out, and an MDT without relative bias gets tables of zeros: the
    published code computes the same from them. Raises UserError for a model that the published
    code cannot represent.
    """
    is_mdt = model.decoder_layers > 0
    for lacks, kind in (
        (is_mdt and not model.side_layers, "a model without a side-interpolater"),
        (is_mdt and not model.learn_sigma, "an MDT that predicts no variance"),
        (not is_mdt and model.relative_bias, "a DiT with a relative position bias"),
        (not is_mdt and model.version == "v2", "a DiT with long skips"),
        (not is_mdt and model.grid[0] != model.grid[1], "a DiT for images that are not square"),
        (not model.num_classes, "an unconditional model"),
        (model.qk_norm, "a model that normalises queries and keys (qk_norm)"),
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
            array = published_layout(pair.path, np.asarray(pair.of(leaves)), model)
        state[pair.name] = np.ascontiguousarray(array)
    if is_mdt:
        index = relative_index(model.grid).astype(np.int64)
        for block, *_ in _blocks(model):
            state[f"{block}.{_INDEX}"] = index
    return state
