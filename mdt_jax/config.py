"""Every field of a config with its default, and what makes a config valid."""

import math

from ml_collections import ConfigDict

from mdt_jax.data import sources
from mdt_jax.errors import UserError
from mdt_jax.models.masking import keep_length
from mdt_jax.sampling import SampleOptions


def default() -> ConfigDict:
    """The defaults: MDT-S/2's shape and the published v1 recipe. Recipes change what they need."""
    return ConfigDict(
        dict(
            model=dict(
                hidden_size=384,
                depth=12,  # encoder and decoder blocks together
                num_heads=6,
                patch_size=2,
                decoder_layers=2,
                num_classes=10,  # 0: unconditional
            ),
            mask=dict(ratio=0.3),  # share of tokens the masked pass hides, in [0, 1)
            diffusion=dict(steps=1000),  # linear β schedule
            data=dict(
                name="digits",  # one of data/sources.py
                image_size=8,
                channels=1,
                batch_size=256,  # global, over all devices
                flip=False,  # mirror half of the images
            ),
            optim=dict(
                lr=3e-4,  # AdamW, constant
                clip_norm=0.0,  # global gradient norm; 0: no clipping
                ema_decay=0.9999,
            ),
            train=dict(
                steps=400_000,
                seed=0,
                dtype="float32",  # of matmuls and activations: float32 or bfloat16
                remat=False,  # recompute activations in the backward pass: less memory, slower
                log_every=100,
                sample_every=10_000,  # EMA sample grids; 0: none
                checkpoint_every=10_000,
                keep=3,  # checkpoints kept
                max_skipped=20,  # non-finite steps in a row that stop the run
            ),
            sample=dict(
                sampler="ddpm",  # ddpm or ddim
                num_steps=250,
                spacing="even",  # or "stride": the published "ddimN"
                guidance_scale=3.8,
                guidance_power=4.0,  # 0: constant weight
                guidance="power_cosine",  # as coded; "power_cosine_printed": as in the paper
                guidance_channels=3,  # first channels of ε guided; 0: all
                num_samples=0,  # made and measured at the end of training; 0: none
                batch_size=100,
            ),
        )
    ).lock()


def variant(config: ConfigDict, name: str) -> ConfigDict:
    """The recipe itself ("") or "smoke": the same structure, so small that it runs in seconds."""
    if name == "smoke":
        config.model.update(hidden_size=16, depth=3, num_heads=2, decoder_layers=1)
        config.data.batch_size = 16
        config.train.update(steps=4, log_every=1, sample_every=2, checkpoint_every=2)
        config.sample.update(num_steps=3, num_samples=20, batch_size=10)
    elif name:
        raise ValueError(f"unknown variant {name!r}; the only one is smoke")
    return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_fields(config: ConfigDict) -> None:
    """Every field of `default()` and no other, each of its type."""
    for group, fields in default().items():
        _require(isinstance(config.get(group), ConfigDict), f"the config lacks the group {group}")
        unknown = set(config[group]) - set(fields)
        _require(not unknown, f"unknown config field {group}.{min(unknown, default='')}")
        for name, value in fields.items():
            given = config[group].get(name)
            wanted = (int, float) if isinstance(value, float) else (type(value),)
            right = isinstance(given, wanted) and isinstance(given, bool) == isinstance(value, bool)
            kind = type(value).__name__
            _require(right, f"{group}.{name} is {given!r}; it must be of type {kind}")
    unknown = set(config) - set(default())
    _require(not unknown, f"unknown group of config fields {min(unknown, default='')}")


def validate(config: ConfigDict, num_devices: int = 1) -> None:
    """Raise UserError, naming the field, for a config that could not train."""
    _check_fields(config)
    model, data, train = config.model, config.data, config.train
    sources.check_name(data.name)
    for name in ("hidden_size", "depth", "num_heads", "patch_size", "decoder_layers"):
        _require(model[name] >= 1, f"model.{name} is {model[name]}; it must be at least 1")
    _require(model.num_classes >= 0, f"model.num_classes is {model.num_classes}; 0 or more")
    for name in ("image_size", "channels", "batch_size"):
        _require(data[name] >= 1, f"data.{name} is {data[name]}; it must be at least 1")
    _require(
        data.image_size % model.patch_size == 0,
        f"model.patch_size {model.patch_size} does not divide data.image_size {data.image_size}",
    )
    _require(
        model.hidden_size % model.num_heads == 0,
        f"model.hidden_size {model.hidden_size} is not divisible by "
        f"model.num_heads {model.num_heads}",
    )
    _require(
        model.hidden_size % 4 == 0,
        f"model.hidden_size {model.hidden_size} must be a multiple of 4 "
        "(sine and cosine of two axes)",
    )
    _require(
        model.decoder_layers < model.depth,
        f"model.decoder_layers {model.decoder_layers} must be smaller than "
        f"model.depth {model.depth}: the encoder needs a block",
    )
    _require(0 <= config.mask.ratio < 1, f"mask.ratio is {config.mask.ratio}; it must be in [0, 1)")
    tokens = (data.image_size // model.patch_size) ** 2
    _require(
        keep_length(tokens, config.mask.ratio) >= 1,
        f"mask.ratio {config.mask.ratio} leaves none of the {tokens} tokens to the encoder",
    )
    _require(
        data.batch_size % num_devices == 0,
        f"data.batch_size {data.batch_size} is not divisible by the {num_devices} devices",
    )
    _require(
        config.diffusion.steps > 20,
        f"diffusion.steps is {config.diffusion.steps}; with 20 or fewer the last β reaches 1",
    )
    optim = config.optim
    _require(0 < optim.lr < math.inf, f"optim.lr is {optim.lr}; it must be positive")
    _require(0 <= optim.clip_norm < math.inf, f"optim.clip_norm is {optim.clip_norm}; 0 or more")
    _require(
        0 <= optim.ema_decay < 1, f"optim.ema_decay is {optim.ema_decay}; it must be in [0, 1)"
    )
    for name in ("steps", "log_every", "checkpoint_every", "keep", "max_skipped"):
        _require(train[name] >= 1, f"train.{name} is {train[name]}; it must be at least 1")
    _require(train.steps < 2**31, f"train.steps is {train.steps}; it must be below 2^31")
    _require(train.sample_every >= 0, f"train.sample_every is {train.sample_every}; 0 or more")
    _require(0 <= train.seed < 2**31, f"train.seed is {train.seed}; it must be in [0, 2^31)")
    _require(
        train.dtype in ("float32", "bfloat16"),
        f"train.dtype is {train.dtype!r}; choose float32 or bfloat16",
    )
    SampleOptions.from_config(config).check(model.num_classes)
    _require(
        config.sample.num_samples == 0 or config.sample.num_samples >= 2,
        f"sample.num_samples is {config.sample.num_samples}; 0, or at least 2 to be measured",
    )
    _require(
        config.sample.batch_size >= 1, f"sample.batch_size is {config.sample.batch_size}; 1 or more"
    )
