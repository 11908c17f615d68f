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
from mdt_jax.weights import networks, torch_files
from mdt_jax.weights.step_folders import check_arrays_possible, check_path


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
    add("--decoder_layers", type=int, help="of an MDT v1 file, which lacks them (default: 2)")
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


def main(argv: list[str]) -> None:
    """Parse the flags, read the weights, write them."""
    args = parse(argv)
    dst = files.as_path(args.dst)
    check_destination(dst)
    cli.start(args)
    with locks.held(locks.beside(dst), str(dst)):
        weights = networks.read_network(args.src, args.params, args.decoder_layers)
        networks.save(dst, weights)
        print_result(f"wrote {dst}: {networks.describe(weights.model)}")
        if weights.stored:
            print_result(f"{args.src} stores {weights.stored}; {dst.name} has float32")
    if dst.suffix:
        for line in networks.unrecorded(weights):
            print_result(f"what {dst.name} cannot record: {line}")


if __name__ == "__main__":
    cli.run(main)
