"""A DiT as diffusers has it, DiTTransformer2DModel of a DiTPipeline: names, layouts, settings."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import state_dicts
from mdt_jax.weights.mdt_names import Pair, dit, linear, our_layout, published_layout, shapes

NETWORK = "a DiT of diffusers"
# Where a folder has its parts.
TRANSFORMER, VAE, INDEX = "transformer", "vae", "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
NULL_LABEL = 1000  # in DiTPipeline, whatever the number of classes
_POSITIONS = "pos_embed.pos_embed"  # fixed; older versions saved it
_EMBEDDERS = {
    "timestep_embedder.linear_1": "timestep_embed/in_proj",
    "timestep_embedder.linear_2": "timestep_embed/out_proj",
}
_BLOCK = {
    "attn1.to_out.0": "attention/proj",
    "ff.net.0.proj": "mlp_in",
    "ff.net.2": "mlp_out",
    "norm1.linear": "modulation/linear",
}
_REST = {
    "pos_embed.proj": "patch_embed",
    "proj_out_1": "final_layer/modulation/linear",
    "proj_out_2": "final_layer/linear",
}
# The sizes in its config, and the largest that is believed.
_SIZES = {
    "attention_head_dim": 1024,
    "in_channels": 1024,
    "num_attention_heads": 1024,
    "num_embeds_ada_norm": 1_000_000,
    "num_layers": 1000,
    "patch_size": 64,
    "sample_size": 1024,
}
# The fields of its config that every DiT has, with their defaults in diffusers.
_SAME = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
# The fields of a scheduler that mdt_jax has in the same form, with their defaults in diffusers.
_SCHEDULE = {
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
# Those that change how samples are drawn, not what the network was trained for.
_DETAILS = {
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "steps_offset",
    "thresholding",
    "timestep_spacing",
}
# DiTPipeline's own defaults; its scheduler is DDIM.
SAMPLING = {
    "sampler": "ddim",
    "num_steps": 50,
    "spacing": "stride",
    "guidance": "constant",
    "guidance_scale": 4.0,
    "guidance_channels": 0,
}


def is_transformer(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state_dict has the names of a DiT of diffusers."""
    return "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" in state


def _pairs(model: MDT) -> Iterator[Pair]:
    """Every array of diffusers' model. Each block has a copy of the embedders."""
    for name, path in _REST.items():
        yield from linear(name, path)
    for layer in range(model.depth):
        block = f"transformer_blocks.{layer}"
        for name, path in _EMBEDDERS.items():
            yield from linear(f"{block}.norm1.emb.{name}", path)
        table = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
        yield Pair(table, "label_embed/table/embedding")
        for third, name in enumerate(("to_q", "to_k", "to_v")):
            yield from linear(f"{block}.attn1.{name}", "encoder/attention/qkv", layer, third)
        for name, path in _BLOCK.items():
            yield from linear(f"{block}.{name}", f"encoder/{path}", layer)


def model_of(config: Mapping[str, Any]) -> MDT:
    """The model that transformer/config.json describes.

    It computes what diffusers computes, which is not what the published DiT does: see
    `MDT.timestep_shift`. Raises UserError for a config of another network.
    """
    sizes: dict[str, int] = {}
    for name, most in _SIZES.items():
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(
                f"{name} in its config.json is {str(value)[:100]}; {NETWORK} has a whole number "
                f"from 1 to {most}"
            )
        sizes[name] = value
    for name, expected in _SAME.items():
        if config.get(name, expected) != expected:
            raise UserError(
                f"{name} in its config.json is {str(config[name])[:100]}; a DiT's is {expected}"
            )
    heads, channels = sizes["num_attention_heads"], sizes["in_channels"]
    out, eps = config.get("out_channels") or channels, config.get("norm_eps", 1e-5)
    if sizes["sample_size"] % sizes["patch_size"]:
        raise UserError("sample_size in its config.json is no multiple of patch_size")
    if out not in (channels, 2 * channels):
        raise UserError(f"out_channels in its config.json is {out}; a DiT's is {2 * channels}")
    if not isinstance(eps, float) or not 0 < eps < math.inf:
        raise UserError(f"norm_eps in its config.json is {eps!r}; it must be a positive number")
    return dit(
        input_size=(sizes["sample_size"],) * 2,
        in_channels=channels,
        hidden_size=heads * sizes["attention_head_dim"],
        depth=sizes["num_layers"],
        num_heads=heads,
        patch_size=sizes["patch_size"],
        num_classes=sizes["num_embeds_ada_norm"],
        learn_sigma=out == 2 * channels,
        timestep_shift=1,
        mlp_norm_eps=eps,
    )


def from_published(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any] | None
) -> tuple[MDT, dict]:
    """(network, float32 parameters) of a state_dict and its config.json, None where it has none.

    Raises UserError, with the first offending names, where they are not of a DiT.
    """
    if not config:
        raise UserError(f"it holds {NETWORK}, whose config.json must lie beside it")
    model = model_of(config)
    state = {name: array for name, array in state.items() if name != _POSITIONS}
    tree = shapes(model)
    empty = {
        path: np.broadcast_to(np.float32(0), leaf.shape)
        for path, leaf in state_dicts.flat(tree).items()
    }
    expected = {
        pair.name: published_layout(pair.path, pair.of(empty), model).shape
        for pair in _pairs(model)
    }
    state_dicts.check(state, expected, NETWORK)
    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in empty.items()}
    filled = {}  # path and layer → the name that the array came from
    for pair in _pairs(model):
        first = filled.setdefault(pair[1:], pair.name)
        if first == pair.name:
            pair.of(leaves)[...] = our_layout(pair.path, state[pair.name])
        elif not np.array_equal(state[first], state[pair.name]):
            raise UserError(f"{pair.name} differs from {first}: a DiT has one embedder for all")
    return model, unflatten_dict(leaves, sep="/")


def to_published(model: MDT, params: dict) -> dict[str, np.ndarray]:
    """The state_dict, float32. Raises UserError for a model that diffusers cannot represent."""
    for lacks, kind in (
        (model.decoder_layers or model.version != "v1", "an MDT"),
        (model.relative_bias, "a DiT with a relative position bias"),
        (not model.num_classes, "an unconditional model"),
        (model.grid[0] != model.grid[1], "a DiT for images that are not square"),
        (model.qk_norm, "a DiT that normalises queries and keys (qk_norm)"),
    ):
        if lacks:
            raise UserError(f"diffusers' DiTPipeline has no place for {kind}")
    leaves = state_dicts.flat(params)
    positions = leaves.get("pos_embed")
    fixed = sincos_positions(model.grid, model.hidden_size)[None]
    if positions is not None and not np.array_equal(positions, fixed):
        raise UserError("diffusers' DiTPipeline has no place for a learned position embedding")
    arrays = {path: np.asarray(array) for path, array in leaves.items()}
    return {
        pair.name: np.ascontiguousarray(published_layout(pair.path, pair.of(arrays), model))
        for pair in _pairs(model)
    }


def config_of(model: MDT) -> dict[str, Any]:
    """transformer/config.json."""
    return {
        "_class_name": "DiTTransformer2DModel",
        **_SAME,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.in_channels,
        "norm_eps": model.mlp_norm_eps,
        "num_attention_heads": model.num_heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": model.depth,
        "out_channels": (1 + model.learn_sigma) * model.in_channels,
        "patch_size": model.patch_size,
        "sample_size": model.input_size[0],
    }


def scheduler_of(options: SampleOptions) -> dict[str, Any]:
    """scheduler/scheduler_config.json over the training schedule.

    It is a DDPM, with its fixed variance, for DDIM with η = 1; else a DDIM.
    """
    total = options.diffusion_steps
    is_ddpm = options.sampler == "ddim" and options.eta == 1
    return {
        "_class_name": "DDPMScheduler" if is_ddpm else "DDIMScheduler",
        **{n: value for n, value in _SCHEDULE.items() if not is_ddpm or n != "set_alpha_to_one"},
        "beta_start": 0.1 / total,
        "beta_end": 20 / total,
        "clip_sample": bool(options.clip_denoised),
        "num_train_timesteps": total,
    }


def sampling_of(scheduler: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """(fields of SampleOptions, what they cannot express) of a scheduler_config.json.

    None: where there is no such file. Raises UserError where the network was trained with another
    noise schedule.
    """
    if scheduler is None:
        return dict(SAMPLING), []
    total = scheduler.get("num_train_timesteps", 1000)
    if type(total) is not int or total < 1:
        raise UserError(f"its scheduler has num_train_timesteps {total!r}; a whole number from 1")
    same = _SCHEDULE | {"beta_start": 0.1 / total, "beta_end": 20 / total}
    for name in same.keys() - _DETAILS:
        value = scheduler.get(name, same[name])
        if value != same[name] and not _close(value, same[name]):
            raise UserError(
                f"its scheduler has {name} {str(value)[:100]}; a DiT is trained with {same[name]}"
            )
    sampling: dict[str, Any] = {**SAMPLING, "diffusion_steps": total}
    kind = scheduler.get("_class_name", "DDIMScheduler")
    is_known = kind in ("DDIMScheduler", "DDPMScheduler")
    lacks = [] if is_known else [f"_class_name {kind}"]
    if kind == "DDPMScheduler":  # with its fixed variance, which is DDIM's for η = 1
        sampling["eta"] = 1.0
        if scheduler.get("variance_type", "fixed_small") != "fixed_small":
            lacks.append(f"variance_type {scheduler['variance_type']}")
    for name in _DETAILS:
        if scheduler.get(name, same[name]) != same[name]:
            lacks.append(f"{name} {str(scheduler[name])[:100]}")
    # The others, as DPM-Solver, do not clip.
    sampling["clip_denoised"] = bool(scheduler.get("clip_sample", is_known))
    return sampling, lacks


def _close(value: object, expected: object) -> bool:
    numbers = isinstance(value, float) and isinstance(expected, float)
    return numbers and math.isclose(value, expected, rel_tol=1e-9)  # type: ignore[arg-type]


def classes_of(index: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names of classes 0, 1, … in a model_index.json; () where it does not name them all."""
    names = index.get("id2label")
    if not isinstance(names, Mapping) or set(names) != {str(n) for n in range(count)}:
        return ()
    each = tuple(names[str(n)] for n in range(count))
    return each if all(isinstance(name, str) for name in each) else ()
