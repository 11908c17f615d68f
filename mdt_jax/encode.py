"""Encode: python -m mdt_jax.encode --config=configs/xl2.py --out=latents/imagenet

Images → the VAE's latents, once for all runs: of each image and its mirror the mean and deviation
of the posterior, in float16, on all devices. Several machines share the work with --part=1/4 and so
on. The same command again goes on where it was stopped. To train on them:
--config.data.name=latents --config.data.path=latents/imagenet
"""

import argparse
import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Generator, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.data import latents, latents_making, pipeline, sources
from mdt_jax.data.crops import CroppedImages
from mdt_jax.models.mdt import input_shape
from mdt_jax.runtime import files, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log, print_result, progress_bar
from mdt_jax.train import inputs
from mdt_jax.weights import vae

SHARD_IMAGES = 2048
EACH_DEVICE = 16  # images in a batch; the VAE takes a few of them at a time
MEASURED = 4096  # images that tell a VAE's scale
NO_VAE = "vae.path is identity: there is nothing to encode with"


def load_vae(config: ConfigDict) -> inputs.Vae:
    """The VAE that encodes. Raises UserError where a config has none."""
    found = inputs.load_vae(config)
    if found is None:
        raise UserError(NO_VAE)
    return found


def open_images(config: ConfigDict) -> CroppedImages:
    """The images of a config in their own order, none standing in for another."""
    if config.vae.path == "identity":
        raise UserError(NO_VAE)
    if config.data.name not in sources.STORED or config.data.name == "latents":
        raise UserError(f"data.name is {config.data.name}; folder, tar and tfds can be encoded")
    if config.data.crop != "center":
        raise UserError(f"data.crop is {config.data.crop}; a cache is of the middle of each image")
    images = sources.squares(config.data, config.model.num_classes, stand_ins=0)
    return dataclasses.replace(images, flip=False)


def encoded(
    config: ConfigDict,
    images: CroppedImages,
    found: inputs.Vae,
    parts: list[np.ndarray],
    known: set[int],
) -> Generator[dict[str, np.ndarray], None, None]:
    """The images of each part in batches: "moments" [n, 4, h, w, c] float16, "labels", "damaged".

    The devices encode a batch while the one before is handed on.
    """
    mesh = parallel.local_mesh()
    size, split = EACH_DEVICE * mesh.size, parallel.split_batch(mesh)
    encode = vae.encoder(found.network, mesh, config.train.precision)
    params = jax.device_put(found.params, parallel.replicated(mesh))
    items = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
    plan = [(each, np.ones(len(each))) for each in items]

    def finish(batch, views):
        count = len(batch["labels"])
        with np.errstate(over="ignore"):
            parts = [np.asarray(m)[:count].astype(latents.MOMENTS) for view in views for m in view]
        moments = np.stack(parts, axis=1)
        if not np.isfinite(moments).all():
            raise UserError(f"{found.path} encodes images to numbers that float16 cannot hold")
        return {"moments": moments, **batch}

    def start(batch):
        pixels = batch.pop("images")
        pixels = np.pad(pixels, [(0, size - len(pixels)), (0, 0), (0, 0), (0, 0)])
        both = jax.device_put((pixels, pixels[:, :, ::-1]), split)
        return batch, [encode(params, view) for view in both]

    waiting, reading = None, (config.data.workers, config.data.max_damaged, known)
    for batch in pipeline.batches(images, plan, *reading):
        started = start(batch)
        if waiting is not None:
            yield finish(*waiting)
        waiting = started
    if waiting is not None:
        yield finish(*waiting)


def describe(
    config: ConfigDict, images: CroppedImages, found: inputs.Vae, shard_images: int
) -> dict:
    """All that a cache is of, as its manifest begins."""
    data = config.data
    return {
        "format": latents.FORMAT,
        "images": len(images),
        "shard_images": shard_images,
        "latents": list(input_shape(config)),
        "image_size": data.image_size,
        "crop": data.crop,
        "vae": found.path,
        "vae_sha256": found.sha256,
        "scale": config.vae.scale,
        "precision": config.train.precision,
        "classes": images.classes if config.model.num_classes else [],
        "images_sha256": images.identity,
        "source": f"{data.name} {data.path}",
    }


def make(config: ConfigDict, out: pathlib.Path, shard_images: int, part: tuple[int, int]) -> None:
    """Encode what is not yet encoded of one part of the shards; part: (which, of how many)."""
    files.check_writable(out, f"--out={out}")
    images = open_images(config)
    name = inputs.name_of(config.data)
    left_out = images.files.left_out
    inputs.check_classes(name, len(images.classes), config.model.num_classes, left_out)
    inputs.settle(config, len(images.classes))
    found = load_vae(config)
    inputs.check_scale(config)
    making = latents_making.CacheWriter(out, describe(config, images, found, shard_images))
    with making.alone(part):
        fill(making, config, images, found, part)


def fill(
    making: latents_making.CacheWriter,
    config: ConfigDict,
    images: CroppedImages,
    found: inputs.Vae,
    part,
) -> None:
    """Encode what is not yet encoded of one part; arguments as of `make`."""
    out = making.folder
    if making.start():
        log(f"{out} is finished already; --verify reads all of it")
        return
    inputs.say_found(config.data, images)
    own = range(part[0], making.num_shards, part[1])
    noted = {shard: making.done(shard) for shard in own}
    left = [shard for shard in own if noted[shard] is None]
    known = {item for note in noted.values() if note for item in note["damaged"]}
    stream = encoded(config, images, found, [making.items(shard) for shard in left], known)
    total, ahead = (sum(len(making.items(shard)) for shard in part) for part in (own, left))
    bar = progress_bar(total, True, "encoding", "image", initial=total - ahead)
    with contextlib.closing(stream), bar:
        for shard in left:
            try:
                making.write(shard, until(stream, len(making.items(shard)), bar))
            except UserError:
                if not making.finished():
                    raise
                break  # a host whose lock is not seen here was quicker with this part, and tidied
    manifest = making.finish()
    if manifest is None:
        print_result(
            f"{out}: this part is done; the last of the {part[1]} to end finishes the cache"
        )
        return
    count = sum(len(shard["damaged"]) for shard in manifest["shards"])
    print_result(
        f"{out}: {len(images) - count} images in {making.num_shards} shards, {count} damaged left "
        f"out; {inputs.describe_scale(manifest['latent_std'], config.vae.scale)}"
    )


def until(stream: Iterator[dict], count: int, bar) -> Iterator[dict]:
    """Batches of a stream that make up `count` images."""
    while count > 0:
        batch = next(stream)
        bar.update(len(batch["labels"]))
        count -= len(batch["labels"])
        yield batch


def parse_part(text: str) -> tuple[int, int]:
    """ "2/4" → (1, 4); "" → this process and how many JAX knows of."""
    if not text:
        return jax.process_index(), jax.process_count()
    numbers = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(f"--part={text} is not such as 2/4, the second of four")
    return int(numbers[1]) - 1, int(numbers[2])


def verify(config: ConfigDict, out: pathlib.Path) -> None:
    """Read a finished cache; UserError for the first thing that is wrong with it."""
    cache = latents.load(out)
    inputs.check_cache(cache, config, load_vae(config))
    inputs.check_scale(config)
    shards, damaged = [], []
    with progress_bar(len(cache), True, "verifying", "image") as bar:
        for number, shard in enumerate(cache.manifest["shards"]):
            shards.append(latents.measure(cache, number))
            damaged += [shards[-1]["wrong"]] if shards[-1]["wrong"] else []
            bar.update(shard["records"])
    if damaged:
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise UserError("; ".join(damaged[:3]) + more)
    made = cache.manifest
    counted = len(cache) + sum(len(shard["damaged"]) for shard in made["shards"])
    if counted != made["images"]:
        raise UserError(f"{out} accounts for {counted} of {made['images']} images")
    std = latents.deviation(shards, made["latents"])
    if doubt := inputs.doubt_scale(std, config.vae.scale):
        raise UserError(f"{out}: {doubt}")
    said = inputs.describe_scale(std, config.vae.scale)
    print_result(f"{out} is sound: {len(cache)} images in {len(shards)} shards; {said}")


def estimate_scale(config: ConfigDict) -> None:
    """Print one over the deviation of the latents of images from all over the set."""
    images = open_images(config)
    found = load_vae(config)
    count = min(MEASURED, len(images))
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
    measured = []
    stream = encoded(config, images, found, [chosen], set())
    with contextlib.closing(stream), progress_bar(count, True, "encoding", "image") as bar:
        for batch in stream:
            measured.append(latents.sums(batch["moments"][batch["damaged"] == -1]))
            bar.update(len(batch["labels"]))
    std = latents.deviation(measured, input_shape(config))
    if not std:
        raise UserError(f"none of {count} images could be read")
    print_result(
        f"vae.scale: {1 / std:.5g}, one over the deviation of the latents of {count} images"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.encode",
        usage="python -m mdt_jax.encode --config=FILE --out=FOLDER [--flag=value …]",
        description="Encode images with a VAE, once for all runs. --config.GROUP.FIELD=VALUE sets "
        "a field.",
    )
    add = parser.add_argument
    add("--out", default="", type=cli.local, help="folder of the latents")
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
        estimate_scale(config)
    elif args.verify:
        verify(config, pathlib.Path(args.out))
    else:
        make(config, pathlib.Path(args.out), args.shard_images, parse_part(args.part))


if __name__ == "__main__":
    cli.run(main)
