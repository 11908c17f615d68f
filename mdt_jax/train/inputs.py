"""What a run is trained on: a config's images or latents, checked, as batches on the devices."""

import dataclasses
from collections.abc import Collection, Generator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax.data import latents, pipeline, sources
from mdt_jax.data.crops import CroppedImages
from mdt_jax.data.pipeline import Source
from mdt_jax.diffusion.options import UNGUIDED, SampleOptions
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import log0
from mdt_jax.weights.vae import Vae


def open_data(config: ConfigDict) -> tuple[Source, sources.Images | None]:
    """The training images or latents of a config, and of a packaged set the held-out images.

    Raises UserError where there is nothing, or it does not fit the config.
    """
    data, held_out = config.data, None
    if data.name in sources.PACKAGED:
        source, held_out = sources.load(data.name)
        _, height, width, channels = source.images.shape
        if (height, width, channels) != (data.image_size, data.image_size, data.channels):
            raise UserError(
                f"{data.name} holds {height}×{width} images with {channels} channels, but "
                f"data.image_size is {data.image_size} and data.channels {data.channels}"
            )
        source = dataclasses.replace(source, flip=data.flip)
    else:
        source = sources.stored(data, config.model.num_classes)
    name = name_of(data)
    if len(source) < data.batch_size:
        raise UserError(
            f"{name} holds {len(source)} images, fewer than data.batch_size {data.batch_size}"
        )
    left_out = source.files.left_out if isinstance(source, CroppedImages) else ""
    check_classes(name, len(source.classes), config.model.num_classes, left_out)
    return source, held_out


def name_of(data: ConfigDict) -> str:
    """What messages call the set of a config's `data`."""
    return f"{data.name} {data.path}".strip()


def say_found(data: ConfigDict, source: Source) -> None:
    """Say once what a set of image files holds, what it leaves out, and what its images lose."""
    if isinstance(source, CroppedImages) and hosts.is_first():
        hosts.log0(f"{name_of(data)}: {source.files.found}")
        for line in source.losses():
            hosts.log0(f"warning: {name_of(data)}: {line}")


def check_classes(name: str, found: int, num_classes: int, left_out: str = "") -> None:
    """Raise UserError where a set does not have the classes that a config is for.

    left_out: what the set leaves out, among which classes may be that are missing.
    """
    if num_classes <= 0 or found == num_classes > 1:
        return
    if found < 2:
        what = "one class: there is nothing to tell apart" if found else "no labels"
        advice = "set model.num_classes to 0 to train without classes"
    else:
        what = f"{found} classes, but model.num_classes is {num_classes}"
        advice = f"set it to {found}, or to 0 to train without classes"
    if left_out and found < num_classes:
        advice = f"see whether what is left out ({left_out}) holds the others, or {advice}"
    raise UserError(f"{name} has {what}; {advice}")


def settle(config: ConfigDict, found: int, said: Collection[str] = ()) -> None:
    """Write into a config what follows from the number of classes that its data has, and say so.

    model.num_classes=-1 becomes that number, or 0 for fewer than two. Without classes there is no
    guidance. said: fields that a person has set, such as sample.guidance_scale. Raises UserError
    where guidance is among them and there are no classes.
    """
    if config.model.num_classes < 0:
        config.model.num_classes = found if found > 1 else 0
        has = {0: "no labels", 1: "one class, nothing to tell apart"}.get(found, f"{found} classes")
        log0(f"model.num_classes is {config.model.num_classes}: the data has {has}")
    if config.model.num_classes or not SampleOptions.from_config(config).guided:
        return
    for name, value in UNGUIDED.items():
        if config.sample[name] in (value, "constant"):  # of which a scale of 1 guides nothing
            continue
        if f"sample.{name}" in said:
            raise UserError(
                f"sample.{name} is {config.sample[name]}, but model.num_classes is 0: an "
                "unconditional model takes no guidance; leave the flag out, or train with classes"
            )
        log0(f"sample.{name} is {value}, not {config.sample[name]}: there are no classes")
        config.sample[name] = value


def check_cache(cache: latents.Latents, config: ConfigDict, found: Vae) -> None:
    """Raise UserError where latents were made with another VAE or size than the config's.

    The scale may be another: latents are multiplied when they are read. Another precision is a
    warning.
    """
    made, hashed = cache.manifest, found.sha256
    compared = {
        "data.image_size": (made["image_size"], config.data.image_size),
        "vae.path": (
            f"{made['vae']} (SHA-256 {made['vae_sha256'][:12]})",
            f"{found.path} (SHA-256 {hashed[:12]})",
        ),
    }
    if hashed == made["vae_sha256"]:
        del compared["vae.path"]
    other = [f"{name} {was}, not {now}" for name, (was, now) in compared.items() if was != now]
    if other:
        raise UserError(f"{cache.folder} was made with {'; '.join(other)}")
    precision = made.get("precision", config.train.precision)
    if precision != config.train.precision:
        log0(
            f"warning: {cache.folder} was made with train.precision {precision}, not "
            f"{config.train.precision}"
        )


USUAL = (2 / 3, 3 / 2)  # deviation of scaled latents: Stable Diffusion's of ImageNet have 0.91


def doubt_scale(std: float, scale: float) -> str:
    """ "", or what is unusual about latents of a deviation that are multiplied by a scale."""
    if USUAL[0] < std * scale < USUAL[1]:
        return ""
    return (
        f"{describe_scale(std, scale)}, which should be about 1; measure vae.scale with "
        "--estimate_scale of mdt_jax.encode"
    )


def describe_scale(std: float, scale: float) -> str:
    """A scale in a few words."""
    return f"latents have a deviation of {std:.4f}, times vae.scale {scale:g} is {std * scale:.3f}"


def feed(
    config: ConfigDict, source: Source, mesh: Mesh, found: Vae | None, start: int
) -> Generator[dict[str, jax.Array], None, None]:
    """Batch `start`, `start` + 1, … on the devices, as `train.step.batch_shapes` says.

    Each process reads what its devices hold. found: the VAE that encodes images on the way, if any.
    """
    size, split = config.data.batch_size, parallel.split_batch(mesh)
    rows = parallel.local_rows(split, size)
    plan = pipeline.Shuffled(len(source), config.train.seed, size, rows, start)
    if found is not None:
        encode = found.encoder(mesh, config.train.precision)
    for arrays in pipeline.batches(source, plan, config.data.workers, config.data.max_damaged):
        del arrays["damaged"]
        batch = {k: jax.make_array_from_process_local_data(split, v) for k, v in arrays.items()}
        if found is not None:
            batch["mean"], batch["std"] = encode(batch.pop("images"))
        yield batch


def describe_classes(classes: list[str]) -> str:
    """The class map in a line, however many there are."""
    named = [f"{number} = {name}" for number, name in enumerate(classes)]
    if len(named) > 12:
        named = [*named[:10], "…", named[-1]]
    return ", ".join(named)
