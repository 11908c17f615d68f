"""Sample: python -m mdt_jax.sample --checkpoint=runs/digits --labels=0,1,2 --out=grid.png

--out=grid.png is one picture of all, samples.npz what ADM's evaluator reads (arr_0 uint8
[N, H, W, C], arr_1 labels), a folder a PNG each. npz and folder are written as the samples come:
the same command goes on where it was stopped. How they came about is kept inside or beside. A model
of latents needs a VAE: --vae=hf://OWNER/REPOSITORY.
"""

import argparse
import pathlib

import numpy as np

from mdt_jax import cli
from mdt_jax.data.images import check_grid, save_animation, save_grid
from mdt_jax.data.sample_files import Folder, Grid, Npz
from mdt_jax.data.sample_notes import written
from mdt_jax.diffusion.options import check_seed
from mdt_jax.runtime import files, hosts, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import is_first, log0
from mdt_jax.runtime.progress import print_result
from mdt_jax.sampling import interpolation, pipeline
from mdt_jax.sampling.generation import request

WRITERS = {".png": Grid, ".npz": Npz, "": Folder}
# What is drawn instead of samples: a row of frames for each.
WALKS = {
    "trajectory": interpolation.trajectory,
    "noise": interpolation.interpolate_noise,
    "classes": interpolation.interpolate_classes,
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.sample",
        usage="python -m mdt_jax.sample --checkpoint=PATH --out=PATH [--flag=value …]",
        description="Draw samples from a run, a file or a released checkpoint.",
    )
    add = parser.add_argument
    add("--out", required=True, type=cli.local, help="grid.png, samples.npz or a folder; or a .gif")
    add("--num_samples", type=cli.count, help="default: as many as --labels, or 100 without")
    add(
        "--labels",
        type=_file_or_classes,
        help='classes, used in turn: 0,1,2 or "golden retriever" (name:1 or number:1 where 1 may '
        "be either); a .txt or .npy with a class for each sample; random; or balanced, all classes "
        "in turn (default)",
    )
    add(
        "--show",
        choices=WALKS,
        help="a row of frames for each sample: predicted clean images from noise to sample, or the "
        "interpolation to the next noise or class",
    )
    add("--frames", type=cli.count, help="with --show: frames of a row (default: 10)")
    parser.add_sampling()
    parser.add_processes()
    return parser.parse_args(argv[1:])


def _file_or_classes(text: str) -> str:
    """A path on this machine, or what else `--labels` takes, as it is."""
    return cli.local(text) if text.endswith((".txt", ".npy")) else text


def save_walk(out: pathlib.Path, images: np.ndarray, note: str) -> None:
    """images: [rows, frames, H, W, C] uint8, as a grid, or where `out` is a .gif moving."""
    if out.suffix == ".gif":
        save_animation(str(out), images.swapaxes(0, 1), note=note)
    else:
        save_grid(str(out), images.reshape(-1, *images.shape[2:]), images.shape[1], note)


def check_out(out: str, show: str | None) -> tuple[pathlib.Path, str]:
    """(where to write, the suffix that says what); UserError for one that is not known."""
    path = pathlib.Path(out)
    if not path.name or (path.name.startswith(".") and not path.suffix and not path.is_dir()):
        raise UserError(f"--out={out} names no file or folder")
    if show:
        known, suffix = (".png", ".gif"), path.suffix
    else:
        known, suffix = tuple(WRITERS), "" if out.endswith("/") or path.is_dir() else path.suffix
    if suffix not in known:
        names = " or ".join(known) if show else ".png, .npz, or a name with / at its end: a folder"
        raise UserError(f"--out={out}: unknown suffix {suffix!r}; use {names}")
    if suffix == "" and path.is_file():
        raise UserError(f"--out={out} is a file; a folder is made where there is none")
    return path, suffix


def main(argv: list[str]) -> None:
    """Parse the flags, load the EMA parameters, sample, decode, write."""
    args = parse(argv)
    out, suffix = check_out(args.out, args.show)
    if args.frames is not None and not args.show:
        raise UserError(f"--frames={args.frames} is for --show")
    check_seed(args.seed)
    cli.start(args, keep_memory=True)
    if suffix:
        pipeline.check_writable(out)
    elif is_first():
        files.check_writable(out, f"--out={out}")
    weights, options, scales = pipeline.load(
        args.checkpoint, args.decoder_layers, args.dtype, vars(args)
    )
    model, params = weights.model, weights.params
    labels = pipeline.parse_labels(
        args.labels, args.num_samples, model.num_classes, weights.classes, args.seed
    )
    vae = pipeline.find_vae(args.checkpoint, weights, args.vae, args.vae_scale)
    to_images, shape = pipeline.decoder(model, vae, args.batch_size, options.precision)
    how = {"seed": args.seed, "batch_size": args.batch_size, "options": options}
    note = pipeline.note_of(args.checkpoint, weights, options, scales, vae)
    note |= pipeline.note_of_labels(labels, args.labels, args.seed, args.batch_size)
    if args.show:
        if scales is not None:
            raise UserError("--show takes one --guidance_scale")
        frames = args.frames or 10
        check_grid(out, len(labels) * frames, shape)
        with hosts.alone(locks.beside(out), str(out)):
            rows = WALKS[args.show](model, params, labels, frames=frames, progress=True, **how)
            images = to_images(rows.reshape(-1, *rows.shape[2:])).reshape(*rows.shape[:2], *shape)
            if is_first():
                note |= {"show": args.show, "frames": frames}
                save_walk(out, images, written(note))
                print_result(f"wrote {len(rows)} rows of {frames} frames to {out}")
        return
    if scales is not None:
        how["guidance_scale"] = np.resize(scales, len(labels))
    asked = request(model, params, labels, **how)
    sink = WRITERS[suffix](out, labels, shape, note)
    hosts.agree({"samples": note})
    if not pipeline.write_samples(asked, sink, to_images):
        log0(f"{out} is finished already")
    elif is_first():
        print_result(f"wrote {len(labels)} samples to {out}")


if __name__ == "__main__":
    cli.run(main)
