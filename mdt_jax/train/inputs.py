"""What a run is trained on: a config's images or latents, checked, as batches on the devices."""

import dataclasses
import math
from collections.abc import Collection, Generator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax.data import latents, pipeline, sources
from mdt_jax.data.crops import CroppedImages
from mdt_jax.data.protocols import Source
from mdt_jax.diffusion.options import UNGUIDED, SampleOptions
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.models.autoencoder import LatentNorm
from mdt_jax.models.mdt import image_sides
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import log0
from mdt_jax.weights.vae import Vae, text_of


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads: training data, the held-out images of a packaged set, and a VAE."""

    source: Source
    held_out: sources.Images | None
    vae: Vae | None

    def identity(self, evaluator: Evaluator | None, num_classes: int) -> dict:
        """Classes and hashes of the data and files that a run depends on, for its checkpoints.

        The first process reads all of the evaluator's reference.
        """
        hashes = {} if self.vae is None else {"vae.path": self.vae.sha256}
        if evaluator is not None:
            reference = evaluator.reference.sha256 if hosts.is_first() else ""
            hashes["evaluation.reference"] = hosts.broadcast(reference)
            if "inception" in evaluator.networks:
                note = evaluator.networks["inception"].note
                hashes["evaluation.inception"] = note["inception_sha256"]
        return {
            "classes": self.source.classes if num_classes else [],
            "images_sha256": self.source.identity,
            "files_sha256": hashes,
        }


def open_inputs(config: ConfigDict, set_fields: Collection[str] = ()) -> Inputs:
    """Open and check the data and the VAE of a config, which is completed by `complete_config`.

    Raises UserError where they do not exist, or do not fit the config or each other.
    """
    source, held_out = open_data(config)
    complete_config(config, len(source.classes), set_fields)
    vae = Vae.from_config(config)
    if vae is not None:
        vae.check_norm()
        record_norm(config, vae)
    if isinstance(source, latents.Latents) and vae is not None:  # a config of latents has a VAE
        check_cache(source, config, vae)
        if doubt := doubt_norm(latents.sums_of(source.manifest), vae.norm):
            log0(f"warning: {source.folder}: {doubt}")
    return Inputs(source, held_out, vae)


def open_data(config: ConfigDict) -> tuple[Source, sources.Images | None]:
    """The training images or latents of a config, and of a packaged set the held-out images.

    Raises UserError where there are none, or they do not fit the config.
    """
    data, held_out = config.data, None
    if data.name in sources.PACKAGED:
        source, held_out = sources.load(data.name)
        _, height, width, channels = source.images.shape
        wanted_height, wanted_width = image_sides(config)
        if (height, width, channels) != (wanted_height, wanted_width, data.channels):
            raise UserError(
                f"{data.name} holds {height}×{width} images with {channels} channels, but the "
                f"config has {wanted_height}×{wanted_width} and data.channels {data.channels}"
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
    """The name of a config's data set in messages."""
    return f"{data.name} {data.path}".strip()


def log_contents(data: ConfigDict, source: Source) -> None:
    """Print what a set of image files holds, what it leaves out, and what its images lose."""
    if isinstance(source, CroppedImages) and hosts.is_first():
        hosts.log0(f"{name_of(data)}: {source.files.summary}")
        for line in source.warnings():
            hosts.log0(f"warning: {name_of(data)}: {line}")


def check_classes(name: str, classes: int, num_classes: int, left_out: str = "") -> None:
    """Raise UserError where a data set has not as many classes as model.num_classes.

    left_out: the files that the data set ignores, in words; they may hold the missing classes.
    """
    if num_classes <= 0 or classes == num_classes > 1:
        return
    if classes < 2:
        problem = "a single class, and two are needed" if classes else "no labels"
        advice = "set model.num_classes to 0 to train without classes"
    else:
        problem = f"{classes} classes, but model.num_classes is {num_classes}"
        advice = f"set it to {classes}, or to 0 to train without classes"
    if left_out and classes < num_classes:
        advice = f"check whether the files left out ({left_out}) hold the others, or {advice}"
    raise UserError(f"{name} has {problem}; {advice}")


def complete_config(config: ConfigDict, classes: int, set_fields: Collection[str] = ()) -> None:
    """Set the config fields that depend on the number of classes in the data, with a line for each.

    model.num_classes=-1 becomes that number, or 0 for fewer than two. Without classes there is no
    guidance but by the masked pass. set_fields: the fields that the user set, for example
    sample.guidance_scale. Raises UserError where guidance is among them and there are no classes.
    """
    if config.model.num_classes < 0:
        config.model.num_classes = classes if classes > 1 else 0
        text = {0: "no labels", 1: "a single class"}.get(classes, f"{classes} classes")
        log0(f"model.num_classes is {config.model.num_classes}: the data has {text}")
    if config.model.num_classes or config.sample.guide != "null":
        return
    if not SampleOptions.from_config(config).guided:
        return
    for name, value in UNGUIDED.items():
        if config.sample[name] in (value, "constant"):  # constant guidance of scale 1 is none
            continue
        if f"sample.{name}" in set_fields:
            raise UserError(
                f"sample.{name} is {config.sample[name]}, but model.num_classes is 0: an "
                "unconditional model takes no guidance; leave the flag out, or train with classes"
            )
        log0(f"sample.{name} is {value}, not {config.sample[name]}: there are no classes")
        config.sample[name] = value


def record_norm(config: ConfigDict, vae: Vae) -> None:
    """Set the empty vae.shift and vae.std of a config to what its VAE records, with a line each."""
    for name in ("shift", "std"):
        text = text_of(getattr(vae.norm, name))
        if text and not config.vae[name]:
            log0(f"vae.{name} is {text}, as {vae.path} records")
            config.vae[name] = text


def check_cache(cache: latents.Latents, config: ConfigDict, vae: Vae) -> None:
    """Raise UserError where latents were made with another VAE or image size than the config's.

    The scale may differ, since latents are scaled when they are read. Another precision is a
    warning.
    """
    manifest, different = cache.manifest, []
    theirs, wanted = manifest["image_size"], list(image_sides(config))
    if (theirs if isinstance(theirs, list) else [theirs, theirs]) != wanted:
        different.append(f"data.image_size {theirs}, not {'×'.join(map(str, wanted))}")
    if manifest["vae_sha256"] != vae.sha256:
        different.append(
            f"vae.path {manifest['vae']} (SHA-256 {manifest['vae_sha256'][:12]}), not {vae.path} "
            f"(SHA-256 {vae.sha256[:12]})"
        )
    if different:
        raise UserError(f"{cache.folder} was made with {'; '.join(different)}")
    precision = manifest.get("precision", config.train.precision)
    if precision != config.train.precision:
        log0(
            f"warning: {cache.folder} was made with train.precision {precision}, not "
            f"{config.train.precision}"
        )


# Usual standard deviations of scaled latents. Stable Diffusion's latents of ImageNet have 0.91.
USUAL_STD = (2 / 3, 3 / 2)


def doubt_norm(sums: latents.Sums, norm: LatentNorm) -> str:
    """A warning where latents have an unusual deviation when they are normalised; else ""."""
    std = sums.deviation(*norm)
    if math.isnan(std) or USUAL_STD[0] < std < USUAL_STD[1]:
        return ""
    return (
        f"{describe_norm(sums, norm)}, which should be about 1; measure vae.scale with "
        "--estimate_scale of mdt_jax.encode"
    )


def describe_norm(sums: latents.Sums, norm: LatentNorm) -> str:
    """The standard deviation of latents, before and after they are normalised, in words."""
    before, after = sums.deviation(), sums.deviation(*norm)
    if math.isnan(after):
        return f"latents have a deviation of {before:.4f}; the cache does not record their channels"
    if norm.shift or norm.std:
        return f"latents have a deviation of {before:.4f}, normalised {after:.3f}"
    return (
        f"latents have a deviation of {before:.4f}, times vae.scale {norm.scale:g} is {after:.3f}"
    )


def feed(
    config: ConfigDict, data: Inputs, mesh: Mesh, start: int
) -> Generator[dict[str, jax.Array], None, None]:
    """Batches number `start`, `start` + 1, … on the devices, as `train.step.batch_shapes` has them.

    Each process reads what its devices hold. Images are encoded on the way where the config has a
    VAE.
    """
    source, size, split = data.source, config.data.batch_size, parallel.split_batch(mesh)
    encode = None
    if data.vae is not None and config.data.name != "latents":
        encode = data.vae.encoder(mesh, config.train.precision)
    rows = parallel.local_rows(split, size)
    plan = pipeline.Shuffled(len(source), config.train.seed, size, rows, start)
    for arrays in pipeline.batches(source, plan, config.data.workers, config.data.max_damaged):
        del arrays["items"], arrays["status"]
        with jax.transfer_guard("allow"):
            batch = {k: jax.make_array_from_process_local_data(split, v) for k, v in arrays.items()}
        if encode is not None:
            batch["mean"], batch["std"] = encode(batch.pop("images"))
        yield batch


def describe_classes(classes: list[str]) -> str:
    """Numbers and names of classes in a line; of more than twelve, the first ten and the last."""
    named = [f"{number} = {name}" for number, name in enumerate(classes)]
    if len(named) > 12:
        named = [*named[:10], "…", named[-1]]
    return ", ".join(named)
