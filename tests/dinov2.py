"""DINOv2 in PyTorch, as facebookresearch/dinov2 defines it, and small random weights of it."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

WIDTH, DEPTH, GRID = 128, 2, 9  # two heads of 64


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return self.proj(out.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp.fc2(functional.gelu(self.mlp.fc1(self.norm2(x)))))


class Dinov2(nn.Module):
    """The class token of normalised images [B, 3, H, W] after the last norm."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH, grid: int = GRID):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 14, 14)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.grid = grid

    def forward(self, images):
        patches = self.patch_embed.proj(images)
        on_grid = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        if patches.shape[2:] != on_grid.shape[2:]:
            scale = [(side + 0.1) / self.grid for side in patches.shape[2:]]
            on_grid = functional.interpolate(on_grid, scale_factor=scale, mode="bicubic")
        tokens = (patches + on_grid).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([first, tokens], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def random_state(seed: int = 0, **sizes) -> dict[str, np.ndarray]:
    """A state_dict of which no array is constant, and whose activations do not vanish."""
    random = np.random.RandomState(seed)
    state = {}
    for name, tensor in Dinov2(**sizes).state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight")):
            array = random.uniform(0.5, 1.5, shape)
        else:
            inputs = np.prod(shape[1:]) if name.endswith("weight") else 100
            array = random.normal(0, inputs**-0.5, shape)
        state[name] = array.astype(np.float32)
    return state


def hugging_face(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state_dict with the names of Hugging Face's files."""
    simple = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    within = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1"}
    within["ls2.gamma"] = "layer_scale2.lambda1"
    renamed = {}
    for name, array in state.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            prefix = f"encoder.layer.{layer}"
            if rest.startswith("attn.qkv."):
                leaf = rest.rpartition(".")[2]
                for part, rows in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                    renamed[f"{prefix}.attention.attention.{part}.{leaf}"] = rows
                continue
            for theirs, ours in within.items():
                rest = rest.replace(theirs, ours)
            renamed[f"{prefix}.{rest}"] = array
        else:
            head = name if name in simple else name.rpartition(".")[0]
            renamed[simple[head] + name[len(head) :]] = array
    return renamed
