"""Every field of a config: its default, its meaning, and what its value must be."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterator

from mdt_jax.data import sources
from mdt_jax.data.crops import CROPS
from mdt_jax.diffusion.losses import LOSS_WEIGHTS
from mdt_jax.diffusion.options import (
    CLIPPING,
    NOT_IN_SAMPLE,
    OWN_GUIDES,
    SAMPLERS_OF,
    SampleOptions,
)
from mdt_jax.models.autoencoder import VAE_SCALE
from mdt_jax.models.xla import ATTENTION, REMAT
from mdt_jax.runtime import files, hub
from mdt_jax.runtime.backend import HIGHEST, PRECISIONS
from mdt_jax.runtime.bounds import ANY, Bound, above, at_least, half_open, one_of

OPTIMIZERS = ("adamw", "adan")
SCHEDULES = ("constant", "cosine", "linear")
BETA = Bound(lambda value: value == -1 or 0 <= value < 1, "in [0, 1), or -1")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config: a bool, int, float or str, as its default is.

    path: for fields that hold paths, the function that replaces ~ and $NAME and refuses other URLs.
    """

    default: bool | int | float | str
    help: str
    bound: Bound = ANY
    path: Callable[[str], str] | None = None

    @property
    def kind(self) -> type:
        return type(self.default)

    @property
    def default_text(self) -> str:
        return "empty" if self.default == "" else str(self.default)


def numbers_of(text: str) -> tuple[float, ...]:
    """The numbers in a text, with commas between them; none in an empty one. Raises ValueError."""
    return tuple(float(part) for part in text.split(",")) if text else ()


def _numbers(least: float, words: str) -> Bound:
    def holds(text: str) -> bool:
        try:
            return all(least < number < math.inf for number in numbers_of(text))
        except ValueError:
            return False

    return Bound(holds, words)


NUMBERS = _numbers(-math.inf, "a number, several with commas between them, or empty")
POSITIVE = _numbers(0.0, "a positive number, several with commas between them, or empty")


def _sample_fields() -> dict[str, Field]:
    """The options of SampleOptions that belong to the group `sample`."""
    published = SampleOptions()
    fields = {
        option.name: Field(
            getattr(published, option.name), option.metadata["help"], option.metadata["bound"]
        )
        for option in dataclasses.fields(SampleOptions)
        if option.name not in NOT_IN_SAMPLE
    }
    clipping = dataclasses.replace(fields["clip_denoised"], default="auto", bound=one_of(CLIPPING))
    guide = dataclasses.replace(fields["guide"], bound=one_of(OWN_GUIDES))
    return fields | {"clip_denoised": clipping, "guide": guide}


FIELDS: dict[str, dict[str, Field]] = dict(
    model=dict(
        version=Field("v1", "v2 adds long skips in the encoder and input skips into the decoder",
                      one_of(("v1", "v2"))),
        hidden_size=Field(384, "width of a token", at_least(1)),
        depth=Field(12, "encoder and decoder blocks together", at_least(1)),
        num_heads=Field(6, "attention heads of a block", at_least(1)),
        patch_size=Field(2, "side of the square that makes a token", at_least(1)),
        decoder_layers=Field(2, "decoder blocks; 0: a DiT, which has no masked pass", at_least(0)),
        side_layers=Field(1, "blocks of the side-interpolater",
                          at_least(1, "; for none, set model.side_interpolater=False")),
        num_classes=Field(10, "0: unconditional; -1: as many as the data has", at_least(-1)),
        relative_bias=Field(True, "the attention has a relative position bias"),
        qk_norm=Field(False, "the attention normalises queries and keys"),
        learned_position=Field(True, "if False, both position embeddings stay sine-cosine"),
        side_interpolater=Field(True, "if False, mask tokens go straight to the decoder"),
        masked_shortcut=Field(True, "only masked tokens take the side-interpolater's prediction"),
    ),
    mask=dict(
        ratio=Field(0.3, "share of the tokens that the masked pass hides", half_open(0, 1)),
        ratio_max=Field(0.0, "if above ratio, each step draws its ratio from [ratio, ratio_max)",
                        half_open(0, 1)),
        passes=Field("both", "passes of a training step", one_of(("both", "full", "masked"))),
        loss_on=Field("all", "tokens in the loss of the masked pass", one_of(("all", "masked"))),
        asymmetric=Field(True, "if False, the decoder sees kept tokens only, as the encoder does"),
    ),
    diffusion=dict(
        steps=Field(1000, "steps of the linear β schedule",
                    at_least(21, ", or the last β would reach 1")),
        objective=Field("epsilon", "what the network predicts: epsilon, the noise; v; or flow, the "
                        "velocity from noise to data", one_of(SAMPLERS_OF)),
        timesteps=Field("uniform", "times of flow; logit_normal: more in the middle",
                        one_of(("uniform", "logit_normal"))),
        loss_weight=Field("uniform", "weight of the squared error over time", one_of(LOSS_WEIGHTS)),
    ),
    data=dict(
        name=Field("digits", "a data set of a package, or the kind of your own",
                   one_of(sources.NAMES)),
        path=Field("", "path of what is read; for tfds also the set's name",
                   path=sources.place),
        split=Field("train", "split of a tfds set"),
        image_size=Field(8, "height of images, and width unless image_width is set", at_least(1)),
        image_width=Field(0, "width of images; 0: that of a square", at_least(0)),
        channels=Field(1, "colour channels: 3, or 1 for grey", at_least(1)),
        batch_size=Field(256, "global batch size, over all devices", at_least(1)),
        flip=Field(False, "mirror half of the images"),
        crop=Field("center", "part of an image that is not square", one_of(CROPS)),
        workers=Field(0, "processes that read; 0: threads", at_least(0)),
        max_damaged=Field(0, "damaged images that each host skips before it stops", at_least(0)),
    ),
    vae=dict(
        path=Field("identity", "file, folder or hf://OWNER/REPOSITORY; identity: train on pixels",
                   path=hub.anywhere_or_hub),
        scale=Field(VAE_SCALE, "factor by which latents are multiplied", above(0)),
        factor=Field(8, "side of an image over the side of its latents", at_least(1)),
        channels=Field(4, "channels of the latents", at_least(1)),
        shift=Field("", "what is subtracted from latents: a number, or 1.5,2,… for each channel; "
                    "empty: as the VAE records", NUMBERS),
        std=Field("", "what latents are divided by, likewise", POSITIVE),
    ),
    init=dict(
        checkpoint=Field("", "weights a new run starts from: a run, a file, hf://…",
                         path=hub.anywhere_or_hub),
        resize=Field(False, "resample these weights where the grid of tokens differs"),
    ),
    optim=dict(
        name=Field("adamw", "optimizer", one_of(OPTIMIZERS)),
        lr=Field(3e-4, "highest learning rate", above(0)),
        schedule=Field("constant", "course of the learning rate after the warm-up",
                       one_of(SCHEDULES)),
        warmup_steps=Field(0, "steps in which the learning rate rises from 0", at_least(0)),
        end_lr=Field(0.0, "learning rate to which cosine and linear fall", at_least(0)),
        weight_decay=Field(0.0, "decoupled decay of the kernels; not of biases and embeddings",
                           at_least(0)),
        b1=Field(-1.0, "first decay rate of the optimizer; -1: as published", BETA),
        b2=Field(-1.0, "second decay rate of the optimizer; -1: as published", BETA),
        clip_norm=Field(0.0, "largest global gradient norm; 0: no clipping", at_least(0)),
        ema_decay=Field(0.9999, "decay of the average of the parameters", half_open(0, 1)),
        ema_warmup=Field(False, "the average covers at most a ninth of the steps so far"),
    ),
    train=dict(
        steps=Field(400_000, "training steps", at_least(1)),
        seed=Field(0, "seed of the whole run", half_open(0, 2**31, "2^31")),
        dtype=Field("float32", "type of matmuls and activations", one_of(("float32", "bfloat16"))),
        precision=Field(HIGHEST, "precision of float32 matmuls on accelerators, the VAE's too",
                        one_of(PRECISIONS)),
        attention=Field("auto", "form of attention: the fastest of the devices, or plain XLA",
                        one_of(ATTENTION)),
        remat=Field("none", "part of a block that the backward pass recomputes", one_of(REMAT)),
        accumulate=Field(1, "parts of the batch that a step takes one after another", at_least(1)),
        log_every=Field(100, "steps between lines of metrics.jsonl", at_least(1)),
        sample_every=Field(10_000, "steps between grids of EMA samples; 0: none", at_least(0)),
        checkpoint_every=Field(10_000, "steps between checkpoints", at_least(1)),
        keep=Field(3, "checkpoints kept", at_least(1)),
        max_skipped=Field(20, "non-finite steps in a row that stop the run", at_least(1)),
    ),
    mesh=dict(
        data=Field(0, "groups of devices that split the batch; 0: all there are", at_least(0)),
        fsdp=Field(1, "devices of a group, which split parameters and EMA too", at_least(1)),
    ),
    sample=dict(
        **_sample_fields(),
        num_samples=Field(0, "samples drawn and measured when training ends", at_least(0)),
        batch_size=Field(100, "samples at once; changes the speed, not the samples", at_least(1)),
    ),
    evaluation=dict(
        every=Field(0, "steps between measurements of EMA samples; 0: none", at_least(0)),
        num_samples=Field(10_000, "samples of a measurement", at_least(4)),
        reference=Field("", "real images or an npz; empty: the held-out part of a packaged set",
                        path=files.anywhere),
        inception=Field("", "weights of FID's Inception; empty: compare images by their pixels",
                        path=hub.anywhere_or_hub),
    ),
)  # fmt: skip


def flat_fields() -> Iterator[tuple[str, Field]]:
    """("optim.lr", its Field), and so on for all fields."""
    for group, fields in FIELDS.items():
        for name, field in fields.items():
            yield f"{group}.{name}", field


def markdown() -> str:
    """docs/config.md: the fields of each group."""
    lines = [
        "# Config fields",
        "",
        "A recipe sets the fields that differ from these defaults, and the flag",
        "`--config.GROUP.FIELD=VALUE` sets one of them for `main`, `encode` or `info`. The command",
        "`python -m mdt_jax.info --fields` prints this page.",
    ]
    for group, fields in FIELDS.items():
        lines += ["", f"## {group}", ""]
        for name, field in fields.items():
            bound = f"; must be {field.bound.words}" if field.bound.words else ""
            text = f"- `{name}`: {field.help}. Default: {field.default_text}{bound}."
            lines.append(textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)
