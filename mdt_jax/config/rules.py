"""What makes a config valid: the type and bound of each field, and rules between fields."""

import types
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.config.fields import FIELDS, flat_fields, numbers_of
from mdt_jax.data import sources
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.inception import WHERE
from mdt_jax.models.masking import keep_length
from mdt_jax.models.mdt import image_sides, input_shape
from mdt_jax.runtime import bounds, limits
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.parallel import mesh_shape

# A switch in this state leaves these fields without an effect: they must keep their defaults.
WITHOUT_EFFECT = {
    ("mask.passes", "full"): (
        "mask.loss_on", "mask.asymmetric", "mask.ratio_max", "model.masked_shortcut",
        "model.side_layers",
    ),
    ("model.side_interpolater", False): ("model.side_layers", "model.masked_shortcut"),
    ("optim.schedule", "constant"): ("optim.end_lr",),
    ("diffusion.objective", "epsilon"): ("diffusion.timesteps",),
    ("diffusion.objective", "v"): ("diffusion.timesteps",),
    ("vae.path", "identity"): ("vae.factor", "vae.channels", "vae.shift", "vae.std"),
}  # fmt: skip

# The message for a config that breaks a rule, and the rule. Both take the groups of the config and
# the values of `_derived`.
RULES: dict[str, Callable[[Any], bool]] = {
    "data.path={data.path} has no effect with data.name={data.name}, which is in a package":
        lambda c: not c.data.path or c.data.name in sources.STORED,
    "data.crop={data.crop} has no effect with data.name=latents, which were cropped already":
        lambda c: c.data.name != "latents" or c.data.crop == "center",
    "data.name=latents requires vae.path, the VAE that encoded them":
        lambda c: c.data.name != "latents" or not c.on_pixels,
    "data.channels is {data.channels}; it must be 3, or 1 for grey images":
        lambda c: c.data.channels in (1, 3) or c.packaged,
    "data.channels is {data.channels}; the VAE requires 3":
        lambda c: c.on_pixels or c.data.channels == 3,
    "data.image_size {image_size} must be a multiple of {vae.factor} for the VAE":
        lambda c: c.on_pixels or all(side % c.vae.factor == 0 for side in c.sides),
    "model.patch_size {model.patch_size} does not divide {input_name} {input_size}":
        lambda c: all(side % c.model.patch_size == 0 for side in c.input_sides),
    "vae.shift has {shifts} numbers; it must be one, or {vae.channels}, one for each channel":
        lambda c: c.shifts in (0, 1, c.vae.channels),
    "vae.std has {stds} numbers; it must be one, or {vae.channels}, one for each channel":
        lambda c: c.stds in (0, 1, c.vae.channels),
    "model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads}":
        lambda c: c.model.hidden_size % c.model.num_heads == 0,
    "model.hidden_size {model.hidden_size} must be a multiple of 4: sine and cosine of two axes":
        lambda c: c.model.hidden_size % 4 == 0,
    "model.decoder_layers is {model.decoder_layers}; it must be below model.depth {model.depth}, "
    "since the encoder needs a block":
        lambda c: c.model.decoder_layers < c.model.depth,
    "model.depth {model.depth} less model.decoder_layers {model.decoder_layers} leaves "
    "{encoder_layers} encoder blocks; v2 requires an even number, for its long skips":
        lambda c: c.model.version == "v1" or c.encoder_layers % 2 == 0,
    "mask.ratio_max is {mask.ratio_max}; it must be above mask.ratio {mask.ratio}, or 0: fixed":
        lambda c: c.mask.ratio_max == 0 or c.mask.ratio <= c.mask.ratio_max,
    "a mask ratio of {highest_ratio} leaves none of the {tokens} tokens to the encoder":
        lambda c: keep_length(c.tokens, c.highest_ratio) >= 1,
    "model.decoder_layers is 0: without a decoder there is no masked pass; set mask.passes=full":
        lambda c: not c.masked_pass or c.model.decoder_layers > 0,
    "mask.asymmetric=False requires model.side_interpolater=True: without it no block would see "
    "the masked tokens":
        lambda c: not c.masked_pass or c.mask.asymmetric or c.model.side_interpolater,
    "mask.loss_on=masked requires a higher mask.ratio than {mask.ratio}: none of the {tokens} "
    "tokens is masked":
        lambda c: not c.masked_loss or keep_length(c.tokens, c.mask.ratio) < c.tokens,
    "sample.guide=masked requires a decoder, and masked passes in training: mask.passes is "
    "{mask.passes} and model.decoder_layers {model.decoder_layers}":
        lambda c: c.sample.guide != "masked" or (c.masked_pass and c.model.decoder_layers > 0),
    "sample.guide_ratio {sample.guide_ratio} leaves none of the {tokens} tokens":
        lambda c: c.sample.guide != "masked" or keep_length(c.tokens, c.sample.guide_ratio) >= 1,
    "sample.guide={sample.guide} has no effect with sample.guidance_scale=1; raise the scale":
        lambda c: c.sample.guide == "null" or c.sample.guidance_scale != 1
        or c.sample.guidance == "power_cosine_printed",
    "optim.warmup_steps is {optim.warmup_steps}; it must be below train.steps {train.steps}":
        lambda c: c.optim.warmup_steps < c.train.steps,
    "optim.end_lr is {optim.end_lr}; it must be at most optim.lr {optim.lr}":
        lambda c: c.optim.end_lr <= c.optim.lr,
    "sample.num_samples is 1; it must be 0, or at least 2 to be measured":
        lambda c: c.sample.num_samples != 1,
    "evaluation.reference is empty, and {data.name} has no held-out images: set it to a folder or "
    "to an npz, for example VIRTUAL_imagenet256_labeled.npz":
        lambda c: c.evaluation.reference or c.packaged
        or not (c.evaluation.every or c.evaluation.inception),
    "evaluation.inception is empty, and the images are too large to be compared by their pixels: "
    f"set it to {WHERE}":
        lambda c: c.evaluation.inception or c.on_pixels
        or not (c.evaluation.every or c.evaluation.reference),
}  # fmt: skip


def _derived(config: ConfigDict) -> types.SimpleNamespace:
    """The groups of a config and the values that rules compare, by name."""
    model, mask, vae = config.model, config.mask, config.vae
    sides, (height, width, _) = image_sides(config), input_shape(config)
    on_pixels, masked_pass = config.vae.path == "identity", mask.passes != "full"
    return types.SimpleNamespace(
        **{group: config[group] for group in FIELDS},
        on_pixels=on_pixels,
        packaged=config.data.name in sources.PACKAGED,
        sides=sides,
        image_size=_by(sides),
        input_sides=(height, width),
        input_size=_by((height, width)),
        input_name="data.image_size" if on_pixels else f"data.image_size / {vae.factor}, which is",
        tokens=(height // model.patch_size) * (width // model.patch_size),
        shifts=len(numbers_of(vae.shift)),
        stds=len(numbers_of(vae.std)),
        encoder_layers=model.depth - model.decoder_layers,
        highest_ratio=max(mask.ratio, mask.ratio_max),
        masked_pass=masked_pass,
        masked_loss=masked_pass and mask.loss_on == "masked",
    )


def _by(sides: tuple[int, int]) -> str:
    """A size in words: 64, or 64×96."""
    return str(sides[0]) if sides[0] == sides[1] else "×".join(map(str, sides))


def get(config: ConfigDict, name: str) -> Any:
    """The value of a field, for example "optim.lr"."""
    group, _, field = name.partition(".")
    return config[group][field]


def check_fields(config: ConfigDict) -> None:
    """Raise UserError unless a config has all fields and no others, each of its type."""
    _check_known("group of config fields ", config, FIELDS)
    for group, fields in FIELDS.items():
        if not isinstance(config.get(group), ConfigDict):
            raise UserError(f"the config lacks the group {group}")
        _check_known(f"config field {group}.", config[group], fields)
        for name, field in fields.items():
            bounds.check(f"{group}.{name}", config[group].get(name), field.kind)


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = set(names) - set(known)
    if unknown:
        raise UserError(f"unknown {what}{min(unknown)}")


def validate(config: ConfigDict, num_devices: int | None = None) -> None:
    """Raise UserError, naming the field, for a config that could not train.

    num_devices: how many there are to train on; None where nothing is to be trained.
    """
    check_fields(config)
    for name, field in flat_fields():
        bounds.check(name, get(config, name), field.kind, field.bound)
    for (switch, state), names in WITHOUT_EFFECT.items():
        if get(config, switch) == state:
            _check_defaults(config, names, f"{switch}={state}")
    values = _derived(config)
    for message, holds in RULES.items():
        if not holds(values):
            raise UserError(message.format_map(vars(values)))
    limits.check_tokens(values.tokens, config.model.hidden_size)
    SampleOptions.from_config(config).check(-1)  # guidance without classes: inputs.complete_config
    if num_devices is not None:
        _check_devices(config, num_devices)


def _check_defaults(config: ConfigDict, names: Iterable[str], reason: str) -> None:
    """Raise UserError for a field that has not its default."""
    defaults = dict(flat_fields())
    for name in names:
        value, default = get(config, name), defaults[name].default
        if value != default:
            raise UserError(f"{name}={value} has no effect with {reason}; leave it at {default}")


def _check_devices(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError where the mesh does not fit the devices, or the batch the mesh."""
    size, parts = config.data.batch_size, config.train.accumulate
    mesh_shape(config.mesh.data, config.mesh.fsdp, num_devices)
    if size % (num_devices * parts):
        times = f" times train.accumulate {parts}" if parts > 1 else ""
        raise UserError(
            f"data.batch_size {size} is not divisible by the {num_devices} devices{times}"
        )
