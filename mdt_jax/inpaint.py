"""Inpaint: python -m mdt_jax.inpaint --checkpoint=runs/digits --image=in.png --mask=mask.png
--label=3 --out=out.png

Draws the part that the mask hides (white: hidden, black: known) and leaves every other pixel
unchanged. The image and the mask are rotated as their EXIF says. The sampler is ddpm or ddim. The
settings are stored in the picture.

In Python `mdt_jax.inpaint(model, params, images, hidden, labels)` is the function of
`mdt_jax.sampling.inpainting`.
"""

import argparse
import inspect
import sys
import types

import numpy as np

from mdt_jax import cli
from mdt_jax.data.classes import parse_label
from mdt_jax.data.images import check_grid, save_grid, save_image, to_float
from mdt_jax.data.masks import read_pair
from mdt_jax.data.sample_notes import written
from mdt_jax.diffusion.options import check_seed
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path, as_path
from mdt_jax.runtime.hosts import is_first
from mdt_jax.runtime.progress import print_result
from mdt_jax.sampling.inpainting import (
    MODES,
    InpaintOptions,
    check_hidden,
    encode_known,
    inpaint,
)
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.sampling.writing import check_writable


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.inpaint",
        usage="python -m mdt_jax.inpaint --checkpoint=PATH --image=PNG --mask=PNG --label=CLASS "
        "--out=PNG [--flag=value …]",
        description="Draw the part of an image that a mask hides, and leave the rest as it was.",
    )
    own = InpaintOptions()
    add = parser.add_argument
    add("--image", required=True, type=cli.anywhere, help="the image to complete")
    add(
        "--mask",
        required=True,
        type=cli.anywhere,
        help="white is hidden, black or transparent known",
    )
    add("--label", help="class of the image, a number or a name; none for an unconditional model")
    add("--out", required=True, type=cli.anywhere, help="out.png; for several completions a grid")
    add("--num_samples", type=cli.count, default=1, help="number of completions")
    add("--resize", **cli.SWITCH, help="crop and resize image and mask to the model's size")
    add("--mode", choices=MODES, default=own.mode)
    add("--jump_length", type=int, help=f"repaint: steps of a jump (default: {own.jump_length})")
    resamples, share = own.num_resamples, own.masked_share
    add("--num_resamples", type=int, help=f"repaint: passes of each stretch (default: {resamples})")
    add("--masked_share", type=float, help=f"side_interpolater: masked steps (default: {share})")
    parser.add_sampling()
    parser.add_processes()
    return parser.parse_args(argv[1:])


def share(hidden: np.ndarray) -> str:
    """The hidden share of a mask, in percent."""
    return f"{100 * hidden.mean():.3g} %"


def inpaint_options(args) -> InpaintOptions:
    """The options that the flags describe. Raises UserError for a flag of the other mode."""
    of = {"jump_length": "repaint", "num_resamples": "repaint", "masked_share": "side_interpolater"}
    given = {name: getattr(args, name) for name in of if getattr(args, name) is not None}
    for name in given:
        if of[name] != args.mode:
            raise UserError(f"--{name} is for --mode={of[name]}")
    return InpaintOptions(args.mode, **given)


def read_label(text: str | None, pipeline: Pipeline) -> int:
    """The class of --label; 0 for an unconditional model. Raises UserError."""
    count = pipeline.model.num_classes
    if count and text is None:
        raise UserError(f"--label is missing: one of {count} classes")
    if not count and text is not None:
        raise UserError("--label was given, but the model is unconditional")
    if text is None:
        return 0
    return parse_label(text.strip(), count, pipeline.classes, f"--label={text}")


def check(args: argparse.Namespace) -> Path:
    """The path of --out. Raises UserError for flags that cannot be used together."""
    out = as_path(args.out)
    if out.suffix != ".png":
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use .png")
    if args.guidance_skip_tolerance:
        raise UserError("--guidance_skip_tolerance saves nothing here; it is for mdt_jax.sample")
    for name in ("guide", "guide_ratio", "encoder_every", "encoder_order"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is for mdt_jax.sample, not for inpainting")
    check_seed(args.seed)
    return out


def main(argv: list[str]) -> None:
    """Parse the flags, load the checkpoint and draw."""
    args = parse(argv)
    out = check(args)
    cli.start(args, keep_memory=True)
    check_writable(out)
    draw(Pipeline.from_flags(vars(args)), args, out)


def draw(pipeline: Pipeline, args: argparse.Namespace, out: Path) -> None:
    """Read image and mask, draw, put the known pixels back, write. Raises UserError."""
    how = inpaint_options(args)
    how.check(pipeline.model, pipeline.options)
    label, shape = read_label(args.label, pipeline), pipeline.image_shape
    check_grid(out, args.num_samples, shape)
    image, hidden = read_pair(args.image, args.mask, shape, args.resize)
    check_hidden(hidden, shape[:2], f"--mask={args.mask} (white is hidden, black known)")
    out.parent.mkdir(parents=True, exist_ok=True)

    known, mask = to_float(image), hidden
    line = f"{args.mask} hides {share(hidden)} of the pixels"
    if pipeline.vae is not None:
        known, mask = encode_known(image, hidden, pipeline.vae, pipeline.options.precision)
        line += f", {share(mask)} of the latents"
    print_result(line)
    count = args.num_samples
    samples = pipeline.inpaint(
        np.stack([known] * count), mask, [label] * count, how=how, seed=args.seed,
        batch_size=args.batch_size, progress=True,
    )  # fmt: skip
    complete = np.where(hidden[:, :, None], pipeline.to_images(samples, args.batch_size), image)
    if not is_first():
        return
    note = pipeline.note() | vars(how) | {
        "image": args.image, "mask": args.mask, "label": args.label, "seed": args.seed,
    }  # fmt: skip
    if count == 1:
        save_image(str(out), complete[0], written(note))
    else:
        save_grid(str(out), complete, note=written(note))
    print_result(f"wrote {count} completion{'s' * (count > 1)} to {out}")


class _Callable(types.ModuleType):
    """This module, which is also the function of its name: `mdt_jax.inpaint(…)`."""

    def __call__(self, *args, **kwargs):
        return inpaint(*args, **kwargs)


__signature__ = inspect.signature(inpaint)
sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    cli.run(main)
