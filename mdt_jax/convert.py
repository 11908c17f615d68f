"""Convert weights: python -m mdt_jax.convert --src=mdt_xl2_v1_ckpt.pt --dst=xl2

The kind of network follows from the names in --src. The suffix of --dst selects the format: .pt or
.safetensors, which the published PyTorch code loads with strict=True; without a suffix an Orbax
folder.
"""

import argparse

from mdt_jax import cli
from mdt_jax.runtime import files, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import print_result
from mdt_jax.weights import diffusers_folders, networks, torch_files
from mdt_jax.weights.step_folders import check_arrays_possible, check_path
from mdt_jax.weights.vae import Vae

FORMATS = ("orbax", "diffusers")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.convert", description="Convert weights from one format to another."
    )
    add = parser.add_argument
    add(
        "--src",
        required=True,
        type=cli.anywhere_or_hub,
        help="a run, folder, .pt, .safetensors or hf://…",
    )
    add(
        "--dst", required=True, type=cli.anywhere, help="FILE.pt, FILE.safetensors, or a new folder"
    )
    add("--params", choices=networks.ITEMS, default="ema", help="which of a run's parameters")
    parser.add_unrecorded()
    add(
        "--format", choices=FORMATS, default="orbax", help="of a new folder: diffusers: DiTPipeline"
    )
    add("--vae", type=cli.anywhere_or_hub, help="of --format=diffusers (default: the run's)")
    return parser.parse_args(argv[1:])


def check_destination(dst: files.Path) -> None:
    """Raise UserError before anything is read where the destination cannot be written."""
    if dst.suffix and dst.suffix not in torch_files.SUFFIXES:
        raise UserError(
            f"--dst={dst}: unknown suffix {dst.suffix!r}; use {', '.join(torch_files.SUFFIXES)}, "
            "or none for a folder"
        )
    if not dst.suffix:
        check_path(dst)
        check_arrays_possible(dst)
    if files.exists(dst):
        raise UserError(f"--dst={dst} exists already; nothing was written")
    parent = files.absolute(dst).parent
    if not (files.in_bucket(dst) or parent.is_dir()):
        raise UserError(f"--dst={dst}: there is no folder {dst.parent}")
    files.check_writable(parent, f"--dst={dst}")


def find_vae(path: str | None, weights: networks.Weights) -> Vae | None:
    """The VAE at a path, or that of the run; None where none is known. Raises UserError."""
    if path:
        return Vae.load(path)
    return None if weights.config is None else Vae.from_config(weights.config)


def main(argv: list[str]) -> None:
    """Parse the flags, read the weights, write them."""
    args = parse(argv)
    dst = files.as_path(args.dst)
    if args.format == "diffusers" and dst.suffix:
        raise UserError(f"--format=diffusers writes a folder, but --dst={dst} has a suffix")
    if args.vae and args.format != "diffusers":
        raise UserError(f"--vae={args.vae} is for --format=diffusers")
    check_destination(dst)
    cli.start(args)
    with locks.held(locks.beside(dst), str(dst)):
        weights = networks.read_network(args.src, args.params, args.decoder_layers, args.num_heads)
        if args.format == "diffusers":
            lines = diffusers_folders.save(dst, weights, find_vae(args.vae, weights))
        else:
            networks.save(dst, weights)
            lines = networks.unrecorded(weights) if dst.suffix else []
        print_result(f"wrote {dst}: {networks.describe(weights.model)}")
        if weights.stored:
            print_result(f"{args.src} stores {weights.stored}; {dst.name} has float32")
    for line in lines:
        print_result(f"what {dst.name} cannot record: {line}")


if __name__ == "__main__":
    cli.run(main)
