"""Encode: python -m mdt_jax.encode --config=configs/xl2.py --out=latents/imagenet

Encodes images to the VAE's latents once for all runs: mean and deviation of the posterior of each
image and of its mirror, in float16, on all devices. Several machines share the work with --part=1/4
and so on. The same command resumes where it was stopped. To train on the cache:
--config.data.name=latents --config.data.path=latents/imagenet
"""

import pathlib
import re

import jax

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.runtime import backend, files
from mdt_jax.runtime.errors import UserError
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


def main(argv: list[str]) -> None:
    """Parse the flags, and encode, verify or estimate."""
    usage = (
        "usage: python -m mdt_jax.encode --config=configs/xl2.py --out=FOLDER "
        "[--verify | --estimate_scale] [--part=2/4] [--shard_images=2048] "
        "[--config.field=value …]\n"
        "Fields and defaults: mdt_jax/config.py"
    )
    optional = {
        "out": ("", "where the latents go"),
        "verify": (False, "read a finished cache and compare it with its manifest"),
        "estimate_scale": (False, "measure what vae.scale should be; nothing is written"),
        "part": ("", "of several machines that fill one folder at once, which this is: 2/4"),
        "shard_images": (
            SHARD_IMAGES,
            "images in a shard, which is what a stop may cost",
        ),
    }
    config, flags = cli.parse_config(argv, usage, optional)
    backend.start()
    out = pathlib.Path(files.local(flags.out))
    configs.validate(config)
    if flags.shard_images < 1:
        raise UserError(f"--shard_images={flags.shard_images}; it must be at least 1")
    if flags.estimate_scale and flags.verify:
        raise UserError("--estimate_scale and --verify exclude each other")
    if flags.estimate_scale:
        encoding.estimate_scale(config)
    elif not flags.out:
        raise UserError(f"--out is missing; {usage.splitlines()[0]}")
    elif flags.verify:
        encoding.verify(config, out)
    else:
        encoding.encode(config, out, flags.shard_images, parse_part(flags.part))


if __name__ == "__main__":
    cli.run(main)
