"""Inpaint: python -m mdt_jax.inpaint --checkpoint=runs/digits --image=in.png --mask=mask.png
--label=3 --out=out.png

Draws what the mask hides (white: hidden, black: known) and leaves every other pixel as it was. The
image and the mask are turned as their EXIF says. The sampler is ddpm or ddim. How the picture came
about is kept inside.

In Python `mdt_jax.inpaint(model, params, images, hidden, labels)` is the function of
`mdt_jax.sampling.inpainting`.
"""

import argparse
import inspect
import pathlib
import sys
import types

import jax
import numpy as np

from mdt_jax import cli
from mdt_jax.data.classes import parse_label
from mdt_jax.data.crops import center_crop, to_rgb
from mdt_jax.data.images import check_grid, save_grid, save_image, to_float
from mdt_jax.data.pictures import opened
from mdt_jax.data.sample_notes import written
from mdt_jax.diffusion.options import check_seed
from mdt_jax.runtime import parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason
from mdt_jax.runtime.progress import print_result
from mdt_jax.sampling import pipeline
from mdt_jax.sampling.inpainting import MODES, InpaintOptions, check_hidden, inpaint
from mdt_jax.weights.vae import encoder


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.inpaint",
        usage="python -m mdt_jax.inpaint --checkpoint=PATH --image=PNG --mask=PNG --label=CLASS "
        "--out=PNG [--flag=value …]",
        description="Draw the part of an image that a mask hides, and leave the rest as it was.",
    )
    own = InpaintOptions()
    add = parser.add_argument
    add("--image", required=True, type=cli.local, help="the image to complete")
    add("--mask", required=True, type=cli.local, help="white is hidden, black or transparent known")
    add("--label", help="class of the image, a number or a name; none for an unconditional model")
    add("--out", required=True, type=cli.local, help="out.png; for several completions a grid")
    add("--num_samples", type=cli.count, default=1, help="number of completions")
    add("--resize", **cli.SWITCH, help="crop and resize image and mask to the model's size")
    add("--mode", choices=MODES, default=own.mode)
    add("--jump_length", type=int, help=f"repaint: steps of a jump (default: {own.jump_length})")
    resamples, share = own.num_resamples, own.masked_share
    add("--num_resamples", type=int, help=f"repaint: passes of each stretch (default: {resamples})")
    add("--masked_share", type=float, help=f"side_interpolater: masked steps (default: {share})")
    parser.add_sampling()
    return parser.parse_args(argv[1:])


def open_picture(path: str, flag: str):
    """A PIL.Image, decoded and turned as its EXIF says. Raises UserError where there is none."""
    from PIL import ImageOps

    try:
        with opened(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # whatever Pillow's readers raise on a damaged file
        raise UserError(f"{flag}={path} could not be read: {reason(error)}") from None


def read_pair(
    image_path: str, mask_path: str, shape: tuple[int, int, int], resize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(image [H, W, C] uint8, hidden [H, W] bool) of the shape (H, W, C); UserError else.

    Both are turned as their EXIF says, which is how programs that draw masks show them, and if
    `resize` cut and resized alike. Of a mask with alpha what is transparent is black, hence known.
    """
    height, width, channels = shape
    image, mask = open_picture(image_path, "--image"), open_picture(mask_path, "--mask")
    try:
        image, mask = to_rgb(image), to_rgb(over_black(mask)).convert("L")
    except ValueError as error:
        raise UserError(f"--image={image_path}, --mask={mask_path}: {reason(error)}") from None
    if mask.size != image.size:
        fits = scaled_alike(mask.size, image.size)
        if not (resize and fits):
            raise UserError(
                f"--mask={mask_path} is {mask.height}×{mask.width}, but the image is "
                f"{image.height}×{image.width}; --resize "
                + ("makes them fit" if fits else "takes masks of the image's proportions only")
            )
        mask = mask.resize(image.size)
    hidden = fitted(mask, shape[:2], resize, f"--mask={mask_path}") > 127
    image = image.convert("L") if channels == 1 else image
    pixels = fitted(image, shape[:2], resize, f"--image={image_path}")
    return pixels.reshape(height, width, channels), hidden


def over_black(mask):
    """A PIL.Image laid over black where it is transparent; as it is where it has no alpha."""
    from PIL import Image

    if "A" not in mask.getbands() and "transparency" not in mask.info:
        return mask
    mask = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, (0, 0, 0, 255)), mask)


def scaled_alike(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask of (W, H) has an image's proportions, but for what rounding changes."""
    (width, height), (wide, high) = sorted((mask, image))
    return abs(high * width / wide - height) < 1


def fitted(image, size: tuple[int, int], resize: bool, name: str) -> np.ndarray:
    """A PIL.Image of the size (H, W), cut in the middle and resized if asked to."""
    height, width = size
    if (image.height, image.width) == size:
        return np.asarray(image)
    if not resize:
        raise UserError(
            f"{name} is {image.height}×{image.width}, but the model draws {height}×{width}; "
            "--resize makes it fit"
        )
    if height != width:
        raise UserError(f"--resize makes squares, but the model draws {height}×{width}")
    return center_crop(image, height)


def encoded(
    image: np.ndarray, hidden: np.ndarray, vae: pipeline.Vae, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents [h, w, c] of what is known of an image, and which of them are hidden [h, w].

    What is hidden does not reach them: it takes the known pixels' mean. A latent is hidden where
    any of its pixels is.
    """
    known = np.where(hidden[:, :, None], image[~hidden].mean(0).astype(np.uint8), image)
    encode = encoder(vae.network, parallel.make_mesh(devices=jax.devices()[:1]), precision)
    mean, _ = encode(vae.params, known[None])
    rows, columns = mean.shape[1:3]
    pixels = hidden.reshape(rows, vae.network.factor, columns, vae.network.factor)
    hidden_there, side = np.asarray(pixels.any((1, 3))), vae.network.factor
    if hidden_there.all():
        raise UserError(
            f"the mask leaves no {side}×{side} pixels whole, so that no latent is known; use one "
            "that leaves larger parts"
        )
    return np.asarray(mean[0]) * np.float32(vae.scale), hidden_there


def share(hidden: np.ndarray) -> str:
    """How much of a mask is hidden."""
    return f"{100 * hidden.mean():.3g} %"


def inpaint_options(args) -> InpaintOptions:
    """Those that the flags ask for; UserError for a flag of the other mode."""
    of = {"jump_length": "repaint", "num_resamples": "repaint", "masked_share": "side_interpolater"}
    given = {name: getattr(args, name) for name in of if getattr(args, name) is not None}
    for name in given:
        if of[name] != args.mode:
            raise UserError(f"--{name} is for --mode={of[name]}")
    return InpaintOptions(args.mode, **given)


def main(argv: list[str]) -> None:
    """Parse the flags, read image and mask, draw, put the known pixels back, write."""
    args = parse(argv)
    out = pathlib.Path(args.out)
    if out.suffix != ".png":
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use .png")
    if args.guidance_skip_tolerance:
        raise UserError("--guidance_skip_tolerance saves nothing here; it is for mdt_jax.sample")
    check_seed(args.seed)
    cli.start(args, keep_memory=True)
    pipeline.check_writable(out)
    weights, options, scales = pipeline.load(
        args.checkpoint, args.decoder_layers, args.dtype, vars(args)
    )
    model = weights.model
    how = inpaint_options(args)
    how.check(model, options)
    if model.num_classes and args.label is None:
        raise UserError(f"--label is missing: one of {model.num_classes} classes")
    if not model.num_classes and args.label is not None:
        raise UserError("--label was given, but the model is unconditional")
    where, label = f"--label={args.label}", 0
    if args.label is not None:
        label = parse_label(args.label.strip(), model.num_classes, weights.classes, where)
    found = pipeline.find_vae(args.checkpoint, weights, args.vae, args.vae_scale)
    to_images, (height, width, channels) = pipeline.decoder(
        model, found, args.batch_size, options.precision
    )
    check_grid(out, args.num_samples, (height, width, channels))
    labels = np.full(args.num_samples, label)
    image, hidden = read_pair(args.image, args.mask, (height, width, channels), args.resize)
    check_hidden(hidden, (height, width), f"--mask={args.mask} (white is hidden, black known)")
    out.parent.mkdir(parents=True, exist_ok=True)

    known, hidden_there = to_float(image), hidden
    said = f"{args.mask} hides {share(hidden)} of the pixels"
    if found is not None:
        known, hidden_there = encoded(image, hidden, found, options.precision)
        said += f", {share(hidden_there)} of the latents"
    print_result(said)
    changes = {} if scales is None else {"guidance_scale": np.resize(scales, len(labels))}
    samples = inpaint(
        model, weights.params, np.stack([known] * len(labels)), hidden_there, labels, how=how,
        seed=args.seed, batch_size=args.batch_size, progress=True, options=options,
        pixels=found is None, **changes,
    )  # fmt: skip
    complete = np.where(hidden[:, :, None], to_images(samples), image)
    note = pipeline.note_of(args.checkpoint, weights, options, scales, found) | vars(how) | {
        "image": args.image, "mask": args.mask, "label": args.label, "seed": args.seed,
    }  # fmt: skip
    if len(complete) == 1:
        save_image(str(out), complete[0], written(note))
    else:
        save_grid(str(out), complete, note=written(note))
    print_result(f"wrote {len(complete)} completion{'s' * (len(complete) > 1)} to {out}")


class _Callable(types.ModuleType):
    """This module, which is also the function of its name: `mdt_jax.inpaint(…)`."""

    def __call__(self, *args, **kwargs):
        return inpaint(*args, **kwargs)


__signature__ = inspect.signature(inpaint)
sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    cli.run(main)
