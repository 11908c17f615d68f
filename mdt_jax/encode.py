"""Encode: python -m mdt_jax.encode --config=configs/xl2.py --out=latents/imagenet

Encodes images to the VAE's latents once for all runs: mean and deviation of the posterior of each
image and of its mirror, in float16, on all devices. Several machines share the work with --part=1/4
and so on. The same command resumes where it was stopped. To train on the cache:
--config.data.name=latents --config.data.path=latents/imagenet
"""

import argparse
import re

import jax

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import as_path
from mdt_jax.train import encoding

SHARD_IMAGES = 2048


def parse_part(text: str) -> tuple[int, int]:
    """ "2/4" → (1, 4); "" → this process and how many JAX knows of."""
    if not text:
        return jax.process_index(), jax.process_count()
    numbers = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(f"--part={text}: expected K/N, e.g. 2/4 for the second of four")
    return int(numbers[1]) - 1, int(numbers[2])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.encode",
        usage="python -m mdt_jax.encode --config=FILE --out=FOLDER [--flag=value …]",
        description="Encode images with a VAE, once for all runs. --config.GROUP.FIELD=VALUE sets "
        "a field.",
    )
    add = parser.add_argument
    add("--out", default="", type=cli.anywhere, help="folder of the latents")
    add("--part", default="", metavar="K/N", help="part K of N, for several machines: 2/4")
    text = f"images of a shard; a stop loses one shard at most (default: {SHARD_IMAGES})"
    add("--shard_images", type=cli.count, default=SHARD_IMAGES, help=text)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--verify", **cli.SWITCH, help="read a finished cache and compare it with its manifest")
    add("--estimate_scale", **cli.SWITCH, help="measure the VAE's scale; nothing is written")
    parser.add_config()
    args = parser.parse_args(argv[1:])
    if not (args.out or args.estimate_scale):
        raise UserError("--out is missing: the folder of the latents")
    return args


def main(argv: list[str]) -> None:
    """Parse the flags and encode, verify or estimate."""
    args = parse(argv)
    config, _ = cli.read_config(args)
    cli.start(args)
    configs.validate(config)
    if args.estimate_scale:
        encoding.estimate_scale(config)
    elif args.verify:
        encoding.verify(config, as_path(args.out))
    else:
        encoding.encode(config, as_path(args.out), args.shard_images, parse_part(args.part))


if __name__ == "__main__":
    cli.run(main)
