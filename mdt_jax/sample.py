"""Sample: python -m mdt_jax.sample --checkpoint=runs/digits --labels=0,1,2 --out=grid.png

--out=grid.png is one picture of all samples, samples.npz the format of ADM's evaluator (arr_0 uint8
[N, H, W, C], arr_1 labels), a folder one PNG per sample. An npz and a folder are written batch by
batch, and the same command resumes after an interruption. The settings are stored with the
samples. A model of latents needs a VAE: --vae=hf://OWNER/REPOSITORY.
"""

import argparse

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
from mdt_jax.sampling import interpolation
from mdt_jax.sampling.generation import Request
from mdt_jax.sampling.labels import parse_labels
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.sampling.writing import check_writable, write_samples

WRITERS = {".png": Grid, ".npz": Npz, "": Folder}
# What --show draws instead of samples: rows of frames.
ROWS = {
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
    add(
        "--out",
        required=True,
        type=cli.anywhere,
        help="grid.png, samples.npz or a folder; or a .gif",
    )
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
        choices=ROWS,
        help="rows of frames instead of samples: predicted clean samples x̂₀ at successive "
        "denoising steps; or interpolation from one noise, or one class, to the next",
    )
    add("--frames", type=cli.count, help="with --show: frames of a row (default: 10)")
    parser.add_sampling()
    parser.add_processes()
    return parser.parse_args(argv[1:])


def _file_or_classes(text: str) -> str:
    """The path of a file, expanded; other values of --labels unchanged."""
    return cli.anywhere(text) if text.endswith((".txt", ".npy")) else text


def asked(pipeline: Pipeline, args: argparse.Namespace) -> tuple[Request, dict]:
    """The request for what the flags ask for, and its note. Raises UserError."""
    labels = parse_labels(
        args.labels, args.num_samples, pipeline.model.num_classes, pipeline.classes, args.seed
    )
    request = pipeline.request(labels, seed=args.seed, batch_size=args.batch_size)
    note = pipeline.note(request, args.labels)
    if args.show:
        note |= {"show": args.show, "frames": args.frames or 10}
        check_grid(args.out, len(labels) * note["frames"], pipeline.image_shape)
    return request, note


def draw_rows(pipeline: Pipeline, request: Request, note: dict) -> np.ndarray:
    """The rows of frames that --show asks for, as images [rows, frames, H, W, C] uint8."""
    if pipeline.scales:
        raise UserError("--show takes one --guidance_scale")
    rows = ROWS[note["show"]](
        *pipeline, request.labels, frames=note["frames"], progress=True, options=pipeline.options,
        guide_network=request.guide, seed=request.seed, batch_size=request.batch_size,
    )  # fmt: skip
    images = pipeline.to_images(rows.reshape(-1, *rows.shape[2:]), request.batch_size)
    return images.reshape(*rows.shape[:2], *pipeline.image_shape)


def write_rows(out: files.Path, images: np.ndarray, note: dict) -> None:
    """Write rows of `draw_rows` as a grid, or to a .gif as an animation."""
    if out.suffix == ".gif":
        save_animation(str(out), images.swapaxes(0, 1), note=written(note))
    else:
        save_grid(str(out), images.reshape(-1, *images.shape[2:]), images.shape[1], written(note))


def check_out(out: str, show: str | None) -> tuple[files.Path, str]:
    """(path, suffix, which decides the format; "" is a folder). Raises UserError for others."""
    path = files.as_path(out)
    if not path.name or (path.name.startswith(".") and not path.suffix and not files.is_dir(path)):
        raise UserError(f"--out={out} names no file or folder")
    if show:
        known, suffix = (".png", ".gif"), path.suffix
    else:
        is_folder = out.endswith("/") or files.is_dir(path)
        known, suffix = tuple(WRITERS), "" if is_folder else path.suffix
    if suffix not in known:
        names = " or ".join(known) if show else ".png, .npz, or a name with / at its end: a folder"
        raise UserError(f"--out={out}: unknown suffix {suffix!r}; use {names}")
    if suffix == "" and files.is_file(path):
        raise UserError(f"--out={out} is a file; a folder is made where there is none")
    return path, suffix


def check(args: argparse.Namespace) -> tuple[files.Path, str]:
    """(path, suffix) of --out. Raises UserError for flags that cannot be used together."""
    if args.frames is not None and not args.show:
        raise UserError(f"--frames={args.frames} is for --show")
    check_seed(args.seed)
    return check_out(args.out, args.show)


def main(argv: list[str]) -> None:
    """Parse the flags, load the checkpoint and draw."""
    args = parse(argv)
    out, suffix = check(args)
    cli.start(args, keep_memory=True)
    if suffix:
        check_writable(out)
    elif is_first():
        files.check_writable(out, f"--out={out}")
    draw(Pipeline.from_flags(vars(args)), args, out, suffix)


def draw(pipeline: Pipeline, args: argparse.Namespace, out: files.Path, suffix: str) -> None:
    """Draw the samples that the flags ask for, decode them and write their images.

    out, suffix: as of `check_out`. Raises UserError.
    """
    request, note = asked(pipeline, args)
    if args.show:
        with hosts.alone(locks.beside(out), str(out)):
            rows = draw_rows(pipeline, request, note)
            if is_first():
                write_rows(out, rows, note)
                count, frames = rows.shape[:2]
                print_result(f"wrote {count} rows of {frames} frames to {out}")
        return
    sink = WRITERS[suffix](out, request.labels, pipeline.image_shape, note)
    hosts.agree({"samples": note})
    if not write_samples(pipeline, request, sink):
        log0(f"{out} is finished already")
    elif is_first():
        print_result(f"wrote {len(request.labels)} samples to {out}")


if __name__ == "__main__":
    cli.run(main)
