"""The published PyTorch names and layouts of MDT's weights, turned into ours. NumPy only.

state = torch.load("mdt_xl2_v1_ckpt.pt", weights_only=True)
params = params_from_published({k: v.numpy() for k, v in state.items()}, decoder_layers=2)
model = MDT(input_size=(32, 32), in_channels=4, **SIZES["XL"])
"""

from collections.abc import Mapping

import numpy as np


def _linear(state: Mapping[str, np.ndarray], name: str) -> dict:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def _block(state: Mapping[str, np.ndarray], name: str) -> dict:
    return {
        "modulation": {"linear": _linear(state, f"{name}.adaLN_modulation.1")},
        "attention": {
            "qkv": _linear(state, f"{name}.attn.qkv"),
            "proj": _linear(state, f"{name}.attn.proj"),
            "relative_bias": state[f"{name}.attn.rel_pos_bias.relative_position_bias_table"],
        },
        "mlp_in": _linear(state, f"{name}.mlp.fc1"),
        "mlp_out": _linear(state, f"{name}.mlp.fc2"),
    }


def _stack(blocks: list[dict]) -> dict:
    first = blocks[0]
    if isinstance(first, dict):
        return {key: _stack([block[key] for block in blocks]) for key in first}
    return np.stack(blocks)


def params_from_published(state: Mapping[str, np.ndarray], decoder_layers: int) -> dict:
    """A published MDT v1 state_dict as the parameters of `models.mdt.MDT`.

    state: arrays by published name. decoder_layers: the published file does not tell it (2 for
    every released size). Raises KeyError when a name is missing.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    split = depth - decoder_layers
    blocks = [_block(state, f"blocks.{i}") for i in range(depth)]
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
        "encoder": _stack(blocks[:split]),
        "decoder": _stack(blocks[split:]),
        "side_interpolater": _stack([_block(state, "sideblocks.0")]),
        "final_layer": {
            "linear": _linear(state, "final_layer.linear"),
            "modulation": {"linear": _linear(state, "final_layer.adaLN_modulation.1")},
        },
    }
    if "y_embedder.embedding_table.weight" in state:
        table = state["y_embedder.embedding_table.weight"]
        params["label_embed"] = {"table": {"embedding": table}}
    return params
