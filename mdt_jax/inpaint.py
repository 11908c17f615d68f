"""Inpaint: python -m mdt_jax.inpaint --checkpoint=runs/digits --image=in.png --mask=mask.png
--label=3 --out=out.png

Draws what the mask hides (white: hidden, black: known) and leaves every other pixel as it was. The
sampler is ddpm or ddim. How the picture came about is kept inside.
"""

import json
import math
import pathlib

import jax
import numpy as np

from mdt_jax import cli, drawing, parallel
from mdt_jax.data.crops import center_crop, to_rgb
from mdt_jax.data.images import save_grid, save_image, to_float
from mdt_jax.errors import UserError
from mdt_jax.files import reason
from mdt_jax.inpainting import MODES, InpaintOptions, inpaint
from mdt_jax.options import check_seed
from mdt_jax.vae import encoder


def parse(argv: list[str]):
    usage = "Draw what a mask hides of an image, and leave the rest as it was."
    parser = cli.Parser(prog="python -m mdt_jax.inpaint", description=usage)
    add = parser.add_argument
    add("--image", required=True, help="the image to complete")
    add("--mask", required=True, help="an image of the same size: white is hidden, black known")
    add("--label", help="its class, a number or a name; none for an unconditional model")
    add("--out", required=True, help="out.png; for several completions a grid")
    add("--num_samples", type=int, default=1, help="how many completions")
    add("--resize", action="store_true", help="cut and resize image and mask to the model's size")
    defaults = InpaintOptions()
    add("--mode", choices=MODES, default=defaults.mode)
    add("--jump_length", type=int, default=defaults.jump_length, help="repaint: steps of a jump")
    add(
        "--num_resamples",
        type=int,
        default=defaults.num_resamples,
        help="repaint: how often each stretch is passed; 1: no jumps",
    )
    add(
        "--masked_share",
        type=float,
        default=defaults.masked_share,
        help="side_interpolater: share of the steps that take the masked pass",
    )
    cli.add_sampling_flags(parser)
    return parser.parse_args(argv[1:])


def open_picture(path: str, flag: str):
    """A PIL.Image of mode RGB; UserError where there is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # whatever Pillow's readers raise on a damaged file
        raise UserError(f"{flag}={path} could not be read: {reason(error)}") from None


def read_image(path: str, size: tuple[int, int], channels: int, resize: bool) -> np.ndarray:
    """[H, W, C] uint8, of the size (H, W) or, if `resize`, cut to it. Raises UserError."""
    image = open_picture(path, "--image")
    pixels = fitted(image.convert("L") if channels == 1 else image, size, resize, f"--image={path}")
    return pixels.reshape(*size, channels)


def read_mask(path: str, size: tuple[int, int], of: tuple[int, int], resize: bool) -> np.ndarray:
    """[H, W] bool, true where hidden. of: (H, W) of the image's file. Raises UserError."""
    mask = open_picture(path, "--mask").convert("L")
    if (mask.height, mask.width) != of:
        if not resize:
            raise UserError(
                f"--mask={path} is {mask.height}×{mask.width}, but the image is {of[0]}×{of[1]}; "
                "--resize makes them fit"
            )
        mask = mask.resize(of[::-1])
    return fitted(mask, size, resize, f"--mask={path}") > 127


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
    image: np.ndarray, hidden: np.ndarray, vae: drawing.Vae
) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents [h, w, c] of what is known of an image, and which of them are hidden [h, w].

    What is hidden does not reach them: it takes the known pixels' mean. A latent is hidden where
    any of its pixels is.
    """
    known = np.where(hidden[:, :, None], image[~hidden].mean(0).astype(np.uint8), image)
    encode = encoder(vae.network, parallel.make_mesh(devices=jax.devices()[:1]))
    mean, _ = encode(vae.params, known[None])
    rows, columns = mean.shape[1:3]
    pixels = hidden.reshape(rows, vae.network.factor, columns, vae.network.factor)
    return np.asarray(mean[0]) * np.float32(vae.scale), pixels.any((1, 3))


def main(argv: list[str]) -> None:
    """Parse the flags, read image and mask, draw, put the known pixels back, write."""
    args = parse(argv)
    out = pathlib.Path(args.out)
    if out.suffix != ".png":
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use .png")
    for name in ("num_samples", "batch_size", "vae_scale"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name}={value} must be positive, and finite")
    check_seed(args.seed)
    weights, options, scales = drawing.load(
        args.checkpoint, args.decoder_layers, args.dtype, vars(args)
    )
    model = weights.model
    how = InpaintOptions(args.mode, args.jump_length, args.num_resamples, args.masked_share)
    how.check(model, options)
    if model.num_classes and args.label is None:
        raise UserError(f"--label is missing: one of {model.num_classes} classes")
    labels = drawing.parse_labels(
        args.label, args.num_samples, model.num_classes, weights.classes, args.seed
    )
    found = drawing.find_vae(args.checkpoint, weights, args.vae, args.vae_scale)
    to_images, (*size, channels) = drawing.decoder(model, found, args.batch_size)
    size = tuple(size)
    shape = open_picture(args.image, "--image").size[::-1]
    hidden = read_mask(args.mask, size, shape, args.resize)
    if not hidden.any() or hidden.all():
        what = "hides nothing: the image would stay as it is"
        if hidden.all():
            what = "hides everything: that is sampling, python -m mdt_jax.sample"
        raise UserError(f"--mask={args.mask} {what}; white is hidden, black known")
    image = read_image(args.image, size, channels, args.resize)
    drawing.check_writable(out)

    known, hidden_there = to_float(image), hidden
    if found is not None:
        known, hidden_there = encoded(image, hidden, found)
    changes = {} if scales is None else {"guidance_scale": np.resize(scales, len(labels))}
    samples = inpaint(
        model, weights.params, np.stack([known] * len(labels)), hidden_there, labels, how=how,
        seed=args.seed, batch_size=args.batch_size, progress=True, options=options,
        pixels=found is None, **changes,
    )  # fmt: skip
    starts = range(0, len(samples), args.batch_size)
    drawn = np.concatenate([to_images(samples[i : i + args.batch_size]) for i in starts])
    complete = np.where(hidden[:, :, None], drawn, image)
    note = drawing.note_of(args.checkpoint, weights, options, scales) | vars(how) | {
        "image": args.image, "mask": args.mask, "label": args.label, "seed": args.seed,
    }  # fmt: skip
    if len(complete) == 1:
        save_image(str(out), complete[0], json.dumps(note, ensure_ascii=False))
    else:
        save_grid(str(out), complete, note=json.dumps(note, ensure_ascii=False))
    print(f"wrote {len(complete)} completion{'s' * (len(complete) > 1)} to {out}")


if __name__ == "__main__":
    cli.run(main)
