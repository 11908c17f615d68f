"""Every field of a config with its default, and what makes a config valid."""

from ml_collections import ConfigDict

from mdt_jax.config_checks import (
    check_blocks,
    check_devices,
    check_evaluation,
    check_mask,
    one_of,
    require,
)
from mdt_jax.data import sources
from mdt_jax.data.crops import CROPS
from mdt_jax.diffusion.losses import LOSS_WEIGHTS
from mdt_jax.diffusion.options import CLIPPING, SampleOptions
from mdt_jax.models.autoencoder import VAE_SCALE
from mdt_jax.models.mdt import VAE_FACTOR, input_shape
from mdt_jax.models.xla import REMAT
from mdt_jax.runtime import files, hub, limits
from mdt_jax.runtime.backend import HIGHEST, PRECISIONS
from mdt_jax.runtime.errors import UserError

OPTIMIZERS = ("adamw", "adan")
# Fields that hold paths, and what understands them.
PATHS = {
    "data.path": files.local,
    "vae.path": hub.on_disk,
    "init.checkpoint": hub.on_disk,
    "evaluation.reference": files.local,
    "evaluation.inception": hub.on_disk,
}


def default() -> ConfigDict:
    """The defaults: MDT-S/2's shape and the published v1 recipe. Recipes change what they need."""
    return ConfigDict(
        dict(
            model=dict(
                version="v1",  # "v2": long skips in the encoder, input skips into the decoder
                hidden_size=384,
                depth=12,  # encoder and decoder blocks together
                num_heads=6,
                patch_size=2,
                decoder_layers=2,  # 0: a DiT, which has no masked pass
                side_layers=1,  # blocks of the side-interpolater
                num_classes=10,  # 0: unconditional; -1: as many as the data has
                relative_bias=True,  # the attention's
                learned_position=True,  # False: both position embeddings stay sine-cosine
                side_interpolater=True,  # False: mask tokens go straight to the decoder
                masked_shortcut=True,  # only masked tokens take the side-interpolater's prediction
            ),
            mask=dict(
                ratio=0.3,  # share of tokens the masked pass hides, in [0, 1)
                ratio_max=0.0,  # above ratio: drawn for each step from [ratio, ratio_max)
                passes="both",  # of each step: full, masked or both
                loss_on="all",  # in the masked pass: the loss of all tokens or of the masked ones
                asymmetric=True,  # False: the decoder sees kept tokens only, as the encoder does
            ),
            diffusion=dict(
                steps=1000,  # linear β schedule
                loss_weight="uniform",  # of the squared error; or min_snr_5
            ),
            data=dict(
                name="digits",  # digits, mnist, …: sets in packages; folder, tar, tfds, latents
                path="",  # of these four: where they lie; of tfds the set's name does as well
                split="train",  # of tfds
                image_size=8,
                channels=1,
                batch_size=256,  # global, over all devices
                flip=False,  # mirror half of the images
                crop="center",  # of images: center or random
                workers=0,  # processes that read; 0: threads
                max_damaged=0,  # damaged images that each host leaves out before it stops
            ),
            vae=dict(
                path="identity",  # identity: the model is trained on pixels
                scale=VAE_SCALE,  # what latents are multiplied by
            ),
            init=dict(
                checkpoint="",  # weights a new run starts from: a run, a file, hf://…
                resize=False,  # resample them where the grid of tokens differs
            ),
            optim=dict(
                name="adamw",  # or adan
                lr=3e-4,  # constant
                clip_norm=0.0,  # global gradient norm; 0: no clipping
                ema_decay=0.9999,
            ),
            train=dict(
                steps=400_000,
                seed=0,
                dtype="float32",  # of matmuls and activations: float32 or bfloat16
                precision=HIGHEST,  # of float32 matmuls on accelerators, the VAE's too
                remat="none",  # what of each block the backward pass recomputes: none, dots, full
                accumulate=1,  # parts of the batch that a step takes after each other
                log_every=100,
                sample_every=10_000,  # EMA sample grids; 0: none
                checkpoint_every=10_000,
                keep=3,  # checkpoints kept
                max_skipped=20,  # non-finite steps in a row that stop the run
            ),
            mesh=dict(
                data=0,  # groups of devices that split the batch; 0: as many as there are
                fsdp=1,  # devices in a group, which split parameters, optimiser and EMA as well
            ),
            sample=dict(
                sampler="ddpm",  # ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun
                num_steps=250,
                spacing="even",  # in t; "stride": the published "ddimN"; karras, log_snr
                eta=0.0,  # ddim's, from 0 (deterministic) to 1
                guidance_scale=3.8,
                guidance_power=4.0,  # 0: constant weight
                guidance="power_cosine",  # as coded; power_cosine_printed: the paper's; constant
                guidance_channels=3,  # first channels of ε guided; 0: all
                guidance_low=0.0,  # shares of the steps between which guidance acts
                guidance_high=1.0,
                guidance_skip_tolerance=0.0,  # weights so near to 1 are taken as 1
                clip_denoised="auto",  # x̂₀ to [−1, 1]: true, false, or auto: where it is pixels
                num_samples=0,  # made and measured at the end of training; 0: none
                batch_size=100,
            ),
            evaluation=dict(
                every=0,  # steps from one measurement of EMA samples to the next; 0: none
                num_samples=10_000,  # of each
                reference="",  # an npz or images; "": the held-out part of a packaged set
                inception="",  # weights of FID's Inception; "": images are compared by pixels
            ),
        )
    ).lock()


def variant(config: ConfigDict, name: str) -> ConfigDict:
    """The recipe itself ("") or "smoke": the same structure, so small that it runs in seconds.

    Recipes for data or a VAE that has to be downloaded are tried on digits.
    """
    if name == "smoke":
        decoder_layers = min(config.model.decoder_layers, 1)
        config.model.update(hidden_size=16, depth=3, num_heads=2, decoder_layers=decoder_layers)
        config.data.batch_size = 16
        if config.vae.path != "identity" or config.data.name in sources.STORED:
            config.vae.path = "identity"
            config.evaluation.update(reference="", inception="")
            config.data.update(name="digits", path="", image_size=8, channels=1)
            config.model.num_classes = min(config.model.num_classes, 10)
        config.train.update(steps=2, log_every=1, sample_every=1, checkpoint_every=1)
        config.sample.update(num_steps=3, num_samples=20, batch_size=10)
        config.evaluation.num_samples = 20
    elif name:
        raise ValueError(f"unknown variant {name!r}; the only one is smoke")
    return config


def complete(stored: dict) -> ConfigDict:
    """A config as a run stored it, with the defaults of the fields that came later."""
    groups = {group: fields.to_dict() for group, fields in default().items()}
    for group, fields in stored.items():
        groups[group] = {**groups.get(group, {}), **fields}
    if isinstance(groups["train"]["remat"], bool):  # before there were policies
        groups["train"]["remat"] = "full" if groups["train"]["remat"] else "none"
    return ConfigDict(groups)


def expand_paths(config: ConfigDict) -> None:
    """Write out ~ in the fields that hold paths. Raises UserError where one holds a URL."""
    for field, local in PATHS.items():
        group, name = field.split(".")
        fields = config.get(group)
        if isinstance(fields, ConfigDict) and isinstance(fields.get(name), str):
            try:
                fields[name] = local(fields[name])
            except UserError as error:
                raise UserError(f"{field}: {error}") from None


def _check_fields(config: ConfigDict) -> None:
    """Every field of `default()` and no other, each of its type."""
    for group, fields in default().items():
        require(isinstance(config.get(group), ConfigDict), f"the config lacks the group {group}")
        unknown = set(config[group]) - set(fields)
        require(not unknown, f"unknown config field {group}.{min(unknown, default='')}")
        for name, value in fields.items():
            given = config[group].get(name)
            wanted = (int, float) if isinstance(value, float) else (type(value),)
            right = isinstance(given, wanted) and isinstance(given, bool) == isinstance(value, bool)
            kind = type(value).__name__
            require(right, f"{group}.{name} is {given!r}; it must be of type {kind}")
            if isinstance(value, (int, float)):
                limits.check_number(f"{group}.{name}", given)
    unknown = set(config) - set(default())
    require(not unknown, f"unknown group of config fields {min(unknown, default='')}")


def validate(config: ConfigDict, num_devices: int | None = None) -> None:
    """Raise UserError, naming the field, for a config that could not train.

    num_devices: how many there are to train on; None where nothing is to be trained.
    """
    _check_fields(config)
    model, data, train = config.model, config.data, config.train
    for name in ("hidden_size", "depth", "num_heads", "patch_size"):
        require(model[name] >= 1, f"model.{name} is {model[name]}; it must be at least 1")
    require(
        model.num_classes >= -1,
        f"model.num_classes is {model.num_classes}; 0 or more, or -1 for as many as the data has",
    )
    for name in ("image_size", "channels", "batch_size"):
        require(data[name] >= 1, f"data.{name} is {data[name]}; it must be at least 1")
    one_of("data.name", data.name, sources.NAMES)
    one_of("data.crop", data.crop, CROPS)
    for name in ("workers", "max_damaged"):
        require(data[name] >= 0, f"data.{name} is {data[name]}; 0 or more")
    require(
        not data.path or data.name in sources.STORED,
        f"data.path={data.path} means nothing with data.name={data.name}, which is in a package",
    )
    require(
        data.name != "latents" or data.crop == "center",
        "data.crop=random means nothing with data.name=latents: they are of the middle",
    )
    require(
        data.name != "latents" or config.vae.path != "identity",
        "data.name=latents needs vae.path, the VAE that they are of",
    )
    require(
        data.channels in (1, 3) or data.name in sources.PACKAGED,
        f"data.channels is {data.channels}; images have 3, or 1 if grey",
    )
    if config.vae.path != "identity":
        require(data.channels == 3, f"data.channels is {data.channels}; the VAE takes 3")
        require(
            data.image_size % VAE_FACTOR == 0,
            f"data.image_size {data.image_size} must be a multiple of {VAE_FACTOR} for the VAE",
        )
    size, of = input_shape(config)[0], "data.image_size"
    if config.vae.path != "identity":
        of = f"the latents' size, an {VAE_FACTOR}th of data.image_size,"
    require(
        size % model.patch_size == 0,
        f"model.patch_size {model.patch_size} does not divide {of} {size}",
    )
    require(
        model.hidden_size % model.num_heads == 0,
        f"model.hidden_size {model.hidden_size} is not divisible by "
        f"model.num_heads {model.num_heads}",
    )
    require(
        model.hidden_size % 4 == 0,
        f"model.hidden_size {model.hidden_size} must be a multiple of 4 "
        "(sine and cosine of two axes)",
    )
    check_blocks(model)
    limits.check_tokens((size // model.patch_size) ** 2, model.hidden_size)
    check_mask(config, (size // model.patch_size) ** 2)
    require(
        config.diffusion.steps > 20,
        f"diffusion.steps is {config.diffusion.steps}; with 20 or fewer the last β reaches 1",
    )
    scale = config.vae.scale
    require(scale > 0, f"vae.scale is {scale}; it must be positive")
    one_of("diffusion.loss_weight", config.diffusion.loss_weight, LOSS_WEIGHTS)
    optim = config.optim
    one_of("optim.name", optim.name, OPTIMIZERS)
    require(optim.lr > 0, f"optim.lr is {optim.lr}; it must be positive")
    require(optim.clip_norm >= 0, f"optim.clip_norm is {optim.clip_norm}; 0 or more")
    require(0 <= optim.ema_decay < 1, f"optim.ema_decay is {optim.ema_decay}; it must be in [0, 1)")
    for name in ("steps", "log_every", "checkpoint_every", "keep", "max_skipped", "accumulate"):
        require(train[name] >= 1, f"train.{name} is {train[name]}; it must be at least 1")
    require(train.sample_every >= 0, f"train.sample_every is {train.sample_every}; 0 or more")
    require(0 <= train.seed < 2**31, f"train.seed is {train.seed}; it must be in [0, 2^31)")
    one_of("train.dtype", train.dtype, ("float32", "bfloat16"))
    one_of("train.precision", train.precision, PRECISIONS)
    one_of("train.remat", train.remat, REMAT)
    one_of("sample.clip_denoised", config.sample.clip_denoised, CLIPPING)
    SampleOptions.from_config(config).check(-1)  # guidance without classes: inputs.settle
    require(
        config.sample.num_samples == 0 or config.sample.num_samples >= 2,
        f"sample.num_samples is {config.sample.num_samples}; 0, or at least 2 to be measured",
    )
    require(
        config.sample.batch_size >= 1, f"sample.batch_size is {config.sample.batch_size}; 1 or more"
    )
    check_evaluation(config)
    if num_devices is not None:
        check_devices(config, num_devices)
