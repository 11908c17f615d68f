"""Which network draws, how, of what classes, what decodes it, and where samples go on the way."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax import __version__
from mdt_jax.data.classes import parse_label, says_which
from mdt_jax.data.images import UINT8_RULE, to_uint8
from mdt_jax.data.sample_files import Sink
from mdt_jax.diffusion.options import (
    SampleOptions,
    balanced_labels,
    check_labels,
    defaults,
    random_labels,
)
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import files, hosts
from mdt_jax.runtime.errors import NotFiniteError, UserError
from mdt_jax.runtime.files import check_regular, reason
from mdt_jax.runtime.hosts import is_first
from mdt_jax.sampling.generation import Request
from mdt_jax.weights.networks import Weights, describe, load_weights, params_sha256
from mdt_jax.weights.vae import Vae, recorded_scale, slice_size

PIXELS = "identity"


def load(
    checkpoint: str, decoder_layers: int | None, dtype: str | None, given: dict
) -> tuple[Weights[MDT], SampleOptions, list[float] | None]:
    """(weights, options, guidance scale of each sample in turn, or None where all have the same).

    given: fields of SampleOptions that override the checkpoint's own; None does not. Its
    guidance_scale is a list, and its vae where the VAE lies, if that is said. Raises UserError.
    """
    weights = load_weights(checkpoint, decoder_layers=decoder_layers)
    if dtype is not None:
        weights = weights._replace(model=weights.model.clone(dtype=jnp.dtype(dtype)))
    vae, fields = given.get("vae"), [field.name for field in dataclasses.fields(SampleOptions)]
    given = {name: given[name] for name in fields if given.get(name) is not None}
    scales = given.pop("guidance_scale", [])
    if len(scales) == 1:
        given["guidance_scale"] = scales[0]
    options = dataclasses.replace(options_of(weights, vae), **given)
    options.check(weights.model.num_classes)
    return weights, options, scales if len(scales) > 1 else None


def options_of(weights: Weights[MDT], vae: str | None = None) -> SampleOptions:
    """How a run draws; of a file the published way. vae: where the VAE lies, if that is said."""
    config = weights.config
    options = defaults(weights.model.num_classes)
    if config is not None:
        options = SampleOptions.from_config(config)
    return options.clipping_for(draws_pixels(weights.model, vae))


def draws_pixels(model: MDT, vae: str | None) -> bool:
    """Whether samples are pixels, as far as the model and where its VAE lies tell."""
    return vae == PIXELS or (vae is None and model.in_channels in (1, 3))


def note_of(
    checkpoint: str,
    weights: Weights[MDT],
    options: SampleOptions,
    scales: list[float] | None = None,
    vae: Vae | None = None,
) -> dict:
    """What tells how samples came about: network, parameters, options, VAE, the uint8 rule."""
    note = {
        "mdt_jax": __version__,
        "checkpoint": checkpoint,
        "step": weights.step,
        "parameters": weights.item or "those of the file",
        "parameters_sha256": params_sha256(weights.params),
        "network": describe(weights.model),
        "num_classes": weights.model.num_classes,
        **({"classes": list(weights.classes)} if weights.classes else {}),
        "dtype": jnp.dtype(weights.model.dtype).name,
        **dataclasses.asdict(options),
        **({} if scales is None else {"guidance_scale": scales}),
        "uint8": UINT8_RULE,
    }
    if vae is not None:
        note |= {"vae": vae.path, "vae_scale": vae.scale, "vae_sha256": vae.sha256}
    return note


def note_of_labels(labels: np.ndarray, said: str | None, seed: int, batch_size: int) -> dict:
    """What tells which samples of a network they are; said: what was said of the labels."""
    return {
        "labels": said or "balanced",
        "labels_sha256": hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
        "num_samples": len(labels),
        "seed": seed,
        "batch_size": batch_size,
    }


def find_vae(
    checkpoint: str, weights: Weights[MDT], path: str | None = None, vae_scale: float | None = None
) -> Vae | None:
    """The VAE that goes with a model of latents; None for a model of pixels.

    path: where it lies; None: where the run's config says. vae_scale: what latents are multiplied
    by; None: as the run was trained, or for a file's as the VAE's folder says, else VAE_SCALE.
    Raises UserError, also where a scale that is given, the run's and the folder's differ.
    """
    model, config, given = weights.model, weights.config, path
    path = path or (config.vae.path if config is not None else None)
    if path == PIXELS and model.in_channels not in (1, 3):
        raise UserError(f"--vae={PIXELS}, but {model.in_channels} channels are no picture's")
    if draws_pixels(model, path):
        if vae_scale is not None:
            raise UserError(f"--vae_scale is for latents; {checkpoint} draws pixels")
        return None
    if path is None:
        raise UserError(
            f"{checkpoint} draws latents of {model.in_channels} channels; to make pictures of "
            "them say --vae=hf://stabilityai/sd-vae-ft-mse, or where the VAE lies"
        )
    trained = config.vae.scale if config is not None else None
    if trained is not None and vae_scale not in (None, trained):
        raise UserError(f"--vae_scale={vae_scale}, but {checkpoint} was trained with {trained}")
    vae = Vae.load(path, trained or vae_scale)
    if weights.vae_sha256 not in (None, vae.sha256):
        hosts.log0(
            f"warning: the VAE {path} is another than the one that {checkpoint} was trained with"
        )
    if vae.network.latent_channels != model.in_channels:
        raise UserError(
            f"the latents of {path} have {vae.network.latent_channels} channels, but the "
            f"model draws {model.in_channels}"
        )
    # A run with its own VAE draws latents as it was trained, whatever is said beside that VAE.
    recorded = recorded_scale(path) if given is not None or trained is None else None
    if recorded not in (None, vae.scale):
        other = f"{checkpoint} was trained with" if trained else "--vae_scale is"
        raise UserError(
            f"the scaling_factor of --vae={path} is {recorded}, but {other} {vae.scale}"
        )
    return vae


def decoder(
    model: MDT, vae: Vae | None, batch_size: int, precision: str
) -> tuple[Callable[..., np.ndarray], tuple[int, int, int]]:
    """(function from samples [n, h, w, c] to uint8 images [n, H, W, C]; an image's shape).

    batch_size: how many samples a batch has, which is also the most that are decoded at a time.
    The function's second argument is the number of the first sample, for messages. It raises
    NotFiniteError.
    """
    if vae is None:
        return lambda samples, first=0: to_uint8(samples), (*model.input_size, model.in_channels)

    height, width = (vae.network.factor * side for side in model.input_size)
    size = min(batch_size, slice_size(height, width) * jax.device_count())

    def to_images(latents, first=0):
        def name(i):
            return f"sample {first + i}"

        images = vae.decode(latents, batch_size=size, precision=precision, name=name)
        return to_uint8(images)

    return to_images, (height, width, 3)


def write_samples(asked: Request, sink: Sink, to_images: Callable, progress: bool = True) -> bool:
    """Draw what a sink has not got yet and give it to it; False where it has all.

    Of several processes the first one writes, and says what is there. Raises UserError where
    another run writes there, and NotFiniteError: of the batch with the first sample that is not
    finite, nothing is written.
    """
    with hosts.alone(sink.lock, str(sink.out)):
        return _write_samples(asked, sink, to_images, progress)


def _write_samples(asked: Request, sink: Sink, to_images: Callable, progress: bool) -> bool:
    total, size = len(asked.labels), asked.batch_size
    starts = range(0, total, size)
    if hosts.broadcast(is_first() and sink.finished()):
        return False
    done = []
    if is_first():
        sink.begin()
        done = [start for start in starts if sink.done(start, min(size, total - start))]
    done = set(hosts.broadcast(done))
    try:
        for start, seen in asked.batches(progress=progress, done=done):
            images = to_images(seen[-1], start)
            if is_first():
                sink.write(start, images)
    except NotFiniteError:
        if is_first():
            sink.give_up()
        raise
    if is_first():
        sink.finish()
    return True


def parse_labels(
    text: str | None,
    num_samples: int | None,
    num_classes: int,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> np.ndarray:
    """`num_samples` labels: those of the text in turn, of a file, random ones, or all in turn.

    classes: the run's own names. Raises UserError, also for a name that says something else, too.
    """
    count = 100 if num_samples is None else num_samples
    from_file = text is not None and text.endswith((".txt", ".npy")) and not says_which(text)
    if text in classes and (from_file or text in ("balanced", "random")):
        raise UserError(
            f"--labels={text} is a class of the run, and says where labels come from, too; "
            f"--labels=name:{text} is the class"
        )
    if text is None or (text == "balanced" and num_classes):
        return balanced_labels(count, num_classes)
    if not num_classes:
        raise UserError("--labels was given, but the model is unconditional")
    if text == "random":
        return random_labels(count, num_classes, seed)
    if from_file:
        labels = read_labels(text, num_classes, classes)
    else:
        parts = [text] if text in classes else text.split(",")
        labels = [
            parse_label(part.strip(), num_classes, classes, f"--labels={text}") for part in parts
        ]
    check_labels(labels, num_classes)
    if from_file and num_samples not in (None, len(labels)):
        raise UserError(
            f"--labels={text} has {len(labels)} labels, but --num_samples={num_samples}; one for "
            "each, or no --num_samples"
        )
    return np.resize(np.asarray(labels, np.int32), num_samples or len(labels))


def read_labels(path: str, num_classes: int, classes: Sequence[str]) -> list[int]:
    """Those of a .npy of whole numbers [N], or of a .txt with a number or name a line."""
    try:
        check_regular(path)
        if path.endswith(".npy"):
            labels = np.load(path, mmap_mode="r")  # no more than there is, whatever its header says
            if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
                raise UserError(f"--labels={path} is no array of whole numbers")
            if labels.ndim != 1 or not len(labels):
                raise UserError(f"--labels={path} has the shape {labels.shape}; it must be [N]")
            return labels.tolist()
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what is damaged
        raise UserError(f"--labels={path} could not be read: {reason(error)}") from None
    labels = [
        parse_label(line.strip(), num_classes, classes, f"--labels={path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not labels:
        raise UserError(f"--labels={path} holds no labels")
    return labels


def check_writable(out: pathlib.Path) -> None:
    """Raise UserError now rather than after much work, where the file --out cannot be written, or
    a folder beside it with what a stopped command has kept. The first process alone writes.
    """
    if not is_first():
        return
    if out.is_dir():
        raise UserError(f"--out={out} cannot be written: it is a folder")
    files.check_writable(out.parent, f"--out={out}")
    for kept in (out.with_name(f"{out.name}.{what}") for what in ("parts", "features")):
        if kept.exists():
            files.check_writable(kept, f"--out={out}: {kept}")
