"""Convert weights: python -m mdt_jax.convert --src=mdt_xl2_v1_ckpt.pt --dst=xl2

The kind of network follows from the names in --src. The suffix of --dst selects the format: .pt or
.safetensors, which the published PyTorch code loads with strict=True; without a suffix an Orbax
folder. --dst=hf://OWNER/REPOSITORY uploads the network with a model card, private unless --public
is given.
"""

import argparse

from mdt_jax import cli
from mdt_jax.evaluation import model_card
from mdt_jax.runtime import files, hub, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import print_result
from mdt_jax.weights import diffusers_folders, kinds, networks, publishing, torch_files
from mdt_jax.weights.step_folders import check_arrays_possible, check_path
from mdt_jax.weights.vae import Vae, norm_of

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
        "--dst",
        required=True,
        type=cli.anywhere_or_hub,
        help="FILE.pt, FILE.safetensors, a new folder, or hf://OWNER/REPOSITORY",
    )
    add("--params", choices=kinds.ITEMS, default="ema", help="which of a run's parameters")
    parser.add_unrecorded()
    add(
        "--format",
        choices=FORMATS,
        default="orbax",
        help="of a new folder; diffusers: of a DiTPipeline",
    )
    add("--vae", type=cli.anywhere_or_hub, help="of --format=diffusers (default: that of --src)")
    add("--public", **cli.SWITCH, help="let everybody see a new repository on the hub")
    add(
        "--card",
        action="append",
        default=[],
        type=cli.anywhere,
        metavar="JSON",
        help="figures for the model card, which mdt_jax.evaluate wrote; may be repeated",
    )
    args = parser.parse_args(argv[1:])
    if not args.dst.startswith(hub.SCHEME):
        for name in ("public", "card"):
            if getattr(args, name):
                raise UserError(f"--{name} is for --dst={hub.SCHEME}…")
    return args


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


def find_vae(path: str | None, weights: kinds.Weights) -> Vae | None:
    """The VAE at a path, or that of the folder or run; None where none is known.

    Raises UserError.
    """
    path, config = path or weights.vae, weights.config
    if path:
        return Vae.load(path, **({} if config is None else norm_of(config)._asdict()))
    return None if config is None else Vae.from_config(config)


def upload(args: argparse.Namespace) -> None:
    """Upload the weights to the hub."""
    for name, default in (("format", FORMATS[0]), ("vae", None)):
        if getattr(args, name) != default:
            raise UserError(f"--{name} is not for --dst={hub.SCHEME}…; convert to a folder first")
    hub.check_uploadable(args.dst)
    cli.start(args)
    weights = networks.read_network(args.src, args.params, args.decoder_layers, args.num_heads)
    sha256 = kinds.params_sha256(weights.params)
    cards = [model_card.read_card(path, sha256) for path in args.card]
    if not cards and not args.src.startswith(hub.SCHEME):
        cards = model_card.cards_of_run(args.src, weights, sha256)
    readme = model_card.render(args.dst, weights, sha256, cards)
    url, is_public = publishing.publish(args.dst, weights, readme, args.public)
    if is_public != args.public:
        print_result(f"{args.dst} existed: it stays {'public' if is_public else 'private'}")
    print_result(f"uploaded {kinds.describe(weights.model)}: {url}")
    if weights.stored:
        print_result(f"{args.src} stores {weights.stored}; the repository has float32")


def main(argv: list[str]) -> None:
    """Parse the flags, read the weights, write them."""
    args = parse(argv)
    if args.dst.startswith(hub.SCHEME):
        upload(args)
        return
    dst = files.as_path(args.dst)
    if args.format == "diffusers" and files.in_bucket(dst):
        raise UserError(f"--dst={dst}: a folder of diffusers is written to a disk; copy it there")
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
        print_result(f"wrote {dst}: {kinds.describe(weights.model)}")
        if weights.stored:
            print_result(f"{args.src} stores {weights.stored}; {dst.name} has float32")
    for line in lines:
        print_result(f"what {dst.name} cannot record: {line}")


if __name__ == "__main__":
    cli.run(main)
