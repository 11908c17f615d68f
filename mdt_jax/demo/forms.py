"""What the page's fields mean: flags of the commands, which run with weights that are loaded."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdt_jax import inpaint, sample
from mdt_jax.data.classes import imagenet_among, imagenet_names, parse_label
from mdt_jax.data.images import open_image, save_image
from mdt_jax.data.masks import fitted, open_mask, open_picture, scaled_alike
from mdt_jax.data.sample_notes import written
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.generation import Request
from mdt_jax.sampling.inpainting import check_hidden
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.train import curves

MAX_COUNT, MAX_ROWS, MAX_FRAMES, MAX_EVALUATIONS = 100, 10, 50, 20_000
RED = (200, 40, 40, 255)  # what is hidden
SHOWN_SIDE = 384  # pixels; smaller pictures are enlarged to about this to be painted on


def class_names(pipeline: Pipeline) -> list[str]:
    """A name for each class: the run's own, or ImageNet's, or its number."""
    names, count = pipeline.classes, pipeline.model.num_classes
    among = imagenet_among(count, names)
    if among is not None:
        return [imagenet_names()[label][0] for label in among]
    return list(names) or [str(number) for number in range(count)]


def label_text(pipeline: Pipeline, number: int) -> str:
    """How --labels names a class."""
    try:
        same = parse_label(str(number), pipeline.model.num_classes, pipeline.classes, "") == number
    except UserError:
        same = False
    return str(number) if same else f"number:{number}"


def options_of(pipeline: Pipeline, values: Mapping[str, Any]) -> list[str]:
    """Flags for the sampling options that differ from the checkpoint's own. Raises UserError."""
    own = dataclasses.asdict(pipeline.options)
    chosen = read_options(pipeline, values).items()
    return [f"--{name}={value}" for name, value in chosen if value != own[name]]


def read_options(pipeline: Pipeline, values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options in fields, of their types. Raises UserError."""
    types = {name: type(getattr(pipeline.options, name)) for name in values}
    return {
        name: value if types[name] is str else number(name, value, types[name])
        for name, value in values.items()
    }


def number(name: str, value: Any, kind: type = int) -> float:
    """The number in a field. The page sends whole numbers as int or as float.

    Raises UserError for a field that is empty or holds no number of the kind.
    """
    if value is None or value == "":
        raise UserError(f"{name} is empty; it must be a number")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} is {value!r}; it must be a number")
    if float(value).is_integer():
        return int(value)
    if kind is int:
        raise UserError(f"{name} is {value}; it must be a whole number")
    return value


def sample_flags(
    pipeline: Pipeline, classes: Sequence[int], count: int, seed: int, values: Mapping[str, Any]
) -> list[str]:
    """The flags of `mdt_jax.sample` for a form. Raises UserError for too many samples."""
    if not 1 <= number("count", count) <= MAX_COUNT:
        raise UserError(f"count is {count}; the page draws 1 to {MAX_COUNT} at a time")
    labels = [f"--labels={','.join(label_text(pipeline, n) for n in classes)}"] if classes else []
    own = [f"--num_samples={number('count', count)}", f"--seed={number('seed', seed)}"]
    return [*labels, *own, *options_of(pipeline, values)]


def command(name: str, pipeline: Pipeline, flags: Sequence[str], out: str) -> str:
    """The command that does the same, to be copied to a shell.

    flags: with those that the checkpoint was loaded with.
    """
    words = ["python", "-m", f"mdt_jax.{name}", f"--checkpoint={pipeline.path}", *flags]
    return shlex.join([*words, f"--out={out}"])


def draw(pipeline: Pipeline, flags: Sequence[str], out: Path) -> Path:
    """Run `mdt_jax.sample` with the flags; returns `out`, a PNG. Raises UserError."""
    args = sample.parse(["", f"--checkpoint={pipeline.path}", *flags, f"--out={out}"])
    path, suffix = sample.check(args)
    sample.draw(pipeline.with_flags(vars(args)), args, path, suffix)
    return out


def check_frames(frames: int) -> None:
    """Raise UserError for a number of frames that the page does not show."""
    if not 2 <= number("frames", frames) <= MAX_FRAMES:
        raise UserError(f"frames is {frames}; the page shows 2 to {MAX_FRAMES}")


def _asked(pipeline: Pipeline, flags: Sequence[str], out: Path) -> tuple[Pipeline, Request, dict]:
    """What flags of `mdt_jax.sample` ask for: pipeline, request, note."""
    args = sample.parse(["", f"--checkpoint={pipeline.path}", *flags, f"--out={out}"])
    sample.check(args)
    pipeline = pipeline.with_flags(vars(args))
    return pipeline, *sample.asked(pipeline, args)


def draw_rows(pipeline: Pipeline, flags: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Draw the rows of `mdt_jax.sample --show` once; returns a PNG and a GIF. Raises UserError."""
    strip, moving = folder / "frames.png", folder / "frames.gif"
    pipeline, request, note = _asked(pipeline, flags, strip)
    if len(request.labels) > MAX_ROWS:
        raise UserError(f"count is {len(request.labels)}; the page shows 1 to {MAX_ROWS} rows")
    rows = sample.draw_rows(pipeline, request, note)
    for path in (strip, moving):
        sample.write_rows(path, rows, note)
    return strip, moving


def draw_one(pipeline: Pipeline, flags: Sequence[str], out: Path) -> np.ndarray:
    """Write one sample in its own size; returns it enlarged, to be painted on."""
    pipeline, request, note = _asked(pipeline, flags, out)
    (image,) = pipeline.to_images(request.draw(progress=True))
    save_image(out, image, written(note))
    return enlarged(pipeline, image)


def fit(pipeline: Pipeline, upload: str, out: Path) -> np.ndarray:
    """Write an uploaded picture in the model's size; returns it enlarged, to be painted on.

    Raises UserError for a file that is no picture.
    """
    height, width, channels = pipeline.image_shape
    picture = open_picture(upload, "the picture")
    picture = picture.convert("L") if channels == 1 else picture
    pixels = fitted(picture, (height, width), True, "the picture")
    save_image(out, pixels.reshape(height, width, channels))
    return shown(pipeline, out)


def mask_layer(pipeline: Pipeline, upload: str) -> np.ndarray:
    """A mask from a file, as a layer of `painted`. White is hidden.

    Raises UserError for a file that is no picture, and for other proportions than the model's.
    """
    height, width = pipeline.image_shape[:2]
    mask = open_mask(upload, "the mask")
    if not scaled_alike(mask.size, (width, height)):
        raise UserError(
            f"the mask is {mask.height}×{mask.width}, but the picture is {height}×{width}; the "
            "mask must have its proportions"
        )
    hidden = enlarged(pipeline, np.asarray(mask.resize((width, height))) > 127)
    return hidden[:, :, None] * np.array(RED, np.uint8)


def shown_size(pipeline: Pipeline) -> tuple[int, int]:
    """(width, height) of `enlarged`."""
    height, width = pipeline.image_shape[:2]
    return width * _scale(pipeline), height * _scale(pipeline)


def _scale(pipeline: Pipeline) -> int:
    return max(1, SHOWN_SIDE // max(pipeline.image_shape[:2]))


def shown(pipeline: Pipeline, image: Path) -> np.ndarray:
    """A picture of `fit` or `draw_one`, enlarged."""
    with open_image(image) as opened:
        return enlarged(pipeline, np.asarray(opened).reshape(pipeline.image_shape))


def enlarged(pipeline: Pipeline, image: np.ndarray) -> np.ndarray:
    """An image [H, W, C] or mask [H, W] with each pixel repeated, so that it can be painted on."""
    large = image.repeat(_scale(pipeline), 0).repeat(_scale(pipeline), 1)
    return large if image.ndim == 2 else np.broadcast_to(large, (*large.shape[:2], 3))


def painted(pipeline: Pipeline, layers: Sequence[np.ndarray]) -> np.ndarray:
    """The pixels [H, W] of which at least half is painted. Raises UserError.

    layers: [h, w, 4] uint8 each, of the size of `enlarged`.
    """
    height, width = pipeline.image_shape[:2]
    scale = _scale(pipeline)
    wanted = (height * scale, width * scale)
    covered = np.zeros(wanted, bool)
    for layer in layers:
        if layer is None:
            continue
        if layer.shape[:2] != wanted:
            raise UserError(
                f"the mask is {layer.shape[0]}×{layer.shape[1]}, but the picture is shown as "
                f"{wanted[0]}×{wanted[1]}; choose the picture again"
            )
        covered |= layer[:, :, 3] > 127
    return covered.reshape(height, scale, width, scale).mean((1, 3)) >= 0.5


def as_seen(pipeline: Pipeline, image: Path, hidden: np.ndarray) -> np.ndarray:
    """The picture, enlarged, with what the model does not see in red: pixels, or latents.

    A latent is a block of pixels, which is hidden if one of them is.
    """
    height, width = pipeline.image_shape[:2]
    if pipeline.vae is not None:
        side = pipeline.vae.network.factor
        blocks = hidden.reshape(height // side, side, width // side, side).any((1, 3))
        hidden = blocks.repeat(side, 0).repeat(side, 1)
    seen = shown(pipeline, image).copy()
    seen[enlarged(pipeline, hidden)] = RED[:3]
    return seen


def complete(
    pipeline: Pipeline, image: Path, hidden: np.ndarray, flags: Sequence[str], folder: Path
) -> Path:
    """Run `mdt_jax.inpaint` on a picture and a mask [H, W] bool; returns the PNG.

    Raises UserError, also for more than MAX_EVALUATIONS.
    """
    check_hidden(hidden, pipeline.image_shape[:2])
    mask, out = folder / "mask.png", folder / "inpainted.png"
    save_image(mask, (hidden * np.uint8(255))[:, :, None])
    own = [f"--checkpoint={pipeline.path}", f"--image={image}", f"--mask={mask}", f"--out={out}"]
    args = inpaint.parse(["", *own, *flags])
    path, how = inpaint.check(args), inpaint.inpaint_options(args)
    pipeline = pipeline.with_flags(vars(args))
    passes = how.num_resamples if how.mode == "repaint" else 1
    if pipeline.options.num_steps * passes > MAX_EVALUATIONS:
        raise UserError(
            f"{pipeline.options.num_steps} steps of {passes} passes are too many for the page; "
            f"their product may be {MAX_EVALUATIONS:,}"
        )
    inpaint.draw(pipeline, args, path)
    return out


def weight_plot(options: SampleOptions) -> str:
    """The guidance weight over the timesteps, as an SVG element.

    Raises UserError for options that cannot be used.
    """
    from matplotlib.figure import Figure

    t = jnp.arange(options.diffusion_steps)
    if options.objective == "flow":
        t = 1 - t / options.diffusion_steps
    weight = np.asarray(options.weight(t, options.guidance_scale))
    figure = Figure(figsize=(4.8, 2.0))
    figure.subplots_adjust(0.14, 0.24, 0.97, 0.96)
    axes = figure.add_subplot()
    axes.plot(np.arange(options.diffusion_steps)[::-1], weight[::-1])
    axes.set_xlim(options.diffusion_steps, 0)
    axes.set_xlabel("timestep, from noise to sample", fontsize=9)
    axes.set_ylabel("weight", fontsize=9)
    axes.grid(alpha=0.3)
    label = f"Guidance weight, from {weight[-1]:.3g} at the noise to {weight[0]:.3g} at the sample"
    return curves.svg(figure, label)
