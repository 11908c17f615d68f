"""The published PyTorch names and layouts of MDT's weights, turned into ours. NumPy only.

state = torch.load("mdt_xl2_v2_ckpt.pt", weights_only=True)
params = params_from_published({k: v.numpy() for k, v in state.items()})
model = MDT(input_size=(32, 32), in_channels=4, version="v2", decoder_layers=4, **SIZES["XL"])
"""

from collections.abc import Mapping

import numpy as np


def _linear(state: Mapping[str, np.ndarray], name: str) -> dict:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def _block(state: Mapping[str, np.ndarray], name: str) -> dict:
    block = {
        "modulation": {"linear": _linear(state, f"{name}.adaLN_modulation.1")},
        "attention": {
            "qkv": _linear(state, f"{name}.attn.qkv"),
            "proj": _linear(state, f"{name}.attn.proj"),
            "relative_bias": state[f"{name}.attn.rel_pos_bias.relative_position_bias_table"],
        },
        "mlp_in": _linear(state, f"{name}.mlp.fc1"),
        "mlp_out": _linear(state, f"{name}.mlp.fc2"),
    }
    if f"{name}.skip_linear.weight" in state:
        block["skip_linear"] = _linear(state, f"{name}.skip_linear")
    return block


def _blocks(state: Mapping[str, np.ndarray], prefix: str) -> list[dict]:
    """All blocks PREFIX.0, PREFIX.1, … in order."""
    numbers = {int(name.split(".")[1]) for name in state if name.startswith(f"{prefix}.")}
    return [_block(state, f"{prefix}.{i}") for i in sorted(numbers)]


def _stack(blocks: list[dict]) -> dict:
    first = blocks[0]
    if isinstance(first, dict):
        return {key: _stack([block[key] for block in blocks]) for key in first}
    return np.stack(blocks)


def params_from_published(state: Mapping[str, np.ndarray], decoder_layers: int = 2) -> dict:
    """A published MDT state_dict, v1 or v2, as the parameters of `models.mdt.MDT`.

    state: arrays by published name. decoder_layers: only v1's file does not tell it (2 for every
    released size). Raises KeyError when a name is missing.
    """
    if any(name.startswith("en_inblocks.") for name in state):
        stacks = {
            "encoder_in": _blocks(state, "en_inblocks"),
            "encoder_out": _blocks(state, "en_outblocks"),
            "decoder": _blocks(state, "de_blocks"),
        }
    else:
        blocks = _blocks(state, "blocks")
        split = len(blocks) - decoder_layers
        stacks = {"encoder": blocks[:split], "decoder": blocks[split:]}
    stacks["side_interpolater"] = _blocks(state, "sideblocks")
    patch = state["x_embedder.proj.weight"]  # [D, C, p, p]
    params = {
        "patch_embed": {
            "kernel": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
            "bias": state["x_embedder.proj.bias"],
        },
        "pos_embed": state["pos_embed"],
        "decoder_pos_embed": state["decoder_pos_embed"],
        "mask_token": state["mask_token"].reshape(-1),
        "timestep_embed": {
            "in_proj": _linear(state, "t_embedder.mlp.0"),
            "out_proj": _linear(state, "t_embedder.mlp.2"),
        },
        **{name: _stack(blocks) for name, blocks in stacks.items()},
        "final_layer": {
            "linear": _linear(state, "final_layer.linear"),
            "modulation": {"linear": _linear(state, "final_layer.adaLN_modulation.1")},
        },
    }
    if "y_embedder.embedding_table.weight" in state:
        table = state["y_embedder.embedding_table.weight"]
        params["label_embed"] = {"table": {"embedding": table}}
    return params
