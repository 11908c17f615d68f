"""What makes groups of a config's fields fit together; each raises UserError, naming the field."""

from ml_collections import ConfigDict

from mdt_jax.data import sources
from mdt_jax.models.inception import WHERE
from mdt_jax.models.masking import keep_length
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.parallel import mesh_shape


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def one_of(field: str, value: str, choices) -> None:
    known = ", ".join(choices)
    require(value in choices, f"{field} is {value!r}; choose one of {known}")


def check_blocks(model: ConfigDict) -> None:
    """How the depth is divided."""
    one_of("model.version", model.version, ("v1", "v2"))
    require(
        0 <= model.decoder_layers < model.depth,
        f"model.decoder_layers is {model.decoder_layers}; it must be 0 (a DiT) or more, and "
        f"smaller than model.depth {model.depth}: the encoder needs a block",
    )
    encoder = model.depth - model.decoder_layers
    require(
        model.version == "v1" or encoder % 2 == 0,
        f"model.depth {model.depth} less model.decoder_layers {model.decoder_layers} leaves "
        f"{encoder} encoder blocks; in v2 they must be even, for the skips from one half to the "
        "other",
    )
    require(
        model.side_layers >= 1,
        f"model.side_layers is {model.side_layers}; it must be at least 1 "
        "(without a side-interpolater: model.side_interpolater=False)",
    )
    if not model.side_interpolater:
        for name, default in (("side_layers", 1), ("masked_shortcut", True)):
            require(
                model[name] == default,
                f"model.{name}={model[name]} means nothing with model.side_interpolater=False",
            )


def check_mask(config: ConfigDict, tokens: int) -> None:
    """The masked pass and its loss, for inputs of `tokens` tokens."""
    mask, model = config.mask, config.model
    one_of("mask.passes", mask.passes, ("both", "full", "masked"))
    one_of("mask.loss_on", mask.loss_on, ("all", "masked"))
    require(0 <= mask.ratio < 1, f"mask.ratio is {mask.ratio}; it must be in [0, 1)")
    require(
        mask.ratio_max == 0 or mask.ratio <= mask.ratio_max < 1,
        f"mask.ratio_max is {mask.ratio_max}; it must be above mask.ratio {mask.ratio} and below "
        "1, or 0 for a fixed ratio",
    )
    most = max(mask.ratio, mask.ratio_max)
    require(
        keep_length(tokens, most) >= 1,
        f"a mask ratio of {most} leaves none of the {tokens} tokens to the encoder",
    )
    if mask.passes == "full":
        for field, value, default in (
            ("mask.loss_on", mask.loss_on, "all"),
            ("mask.asymmetric", mask.asymmetric, True),
            ("mask.ratio_max", mask.ratio_max, 0),
            ("model.masked_shortcut", model.masked_shortcut, True),
            ("model.side_layers", model.side_layers, 1),
        ):
            require(
                value == default,
                f"{field}={value} means nothing with mask.passes=full: there is no masked pass",
            )
    else:
        require(
            model.decoder_layers > 0,
            "model.decoder_layers is 0: without a decoder there is no masked pass; "
            "set mask.passes=full",
        )
        require(
            mask.asymmetric or model.side_interpolater,
            "mask.asymmetric=False means nothing with model.side_interpolater=False: no block "
            "would see the masked tokens",
        )
        require(
            mask.loss_on == "all" or keep_length(tokens, mask.ratio) < tokens,
            f"mask.loss_on=masked means nothing with mask.ratio {mask.ratio}: none of the {tokens} "
            "tokens is masked",
        )


def check_evaluation(config: ConfigDict) -> None:
    """What samples are measured against while training."""
    asked, data = config.evaluation, config.data.name
    require(asked.every >= 0, f"evaluation.every is {asked.every}; 0 or more")
    require(
        asked.num_samples >= 4,
        f"evaluation.num_samples is {asked.num_samples}; it must be 4 or more",
    )
    if asked.every or asked.inception:
        require(
            bool(asked.reference) or data in sources.PACKAGED,
            f"evaluation.reference is empty, and {data} has no held-out images: set it to an npz "
            "such as VIRTUAL_imagenet256_labeled.npz, or to a folder",
        )
    if asked.every or asked.reference:
        require(
            bool(asked.inception) or config.vae.path == "identity",
            "evaluation.inception is empty, and the images are too large to be compared by their "
            f"pixels: set it to {WHERE}",
        )


def check_devices(config: ConfigDict, num_devices: int) -> None:
    """The mesh fits the devices, and the batch the mesh."""
    mesh, size, parts = config.mesh, config.data.batch_size, config.train.accumulate
    require(mesh.data >= 0, f"mesh.data is {mesh.data}; 0 or more")
    require(mesh.fsdp >= 1, f"mesh.fsdp is {mesh.fsdp}; it must be at least 1")
    mesh_shape(mesh.data, mesh.fsdp, num_devices)
    require(
        size % (num_devices * parts) == 0,
        f"data.batch_size {size} is not divisible by the {num_devices} devices"
        + (f" times train.accumulate {parts}" if parts > 1 else ""),
    )
