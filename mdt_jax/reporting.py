"""What a run in training shows of its samples: grids, measurements, and those at its end."""

import contextlib
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict

from mdt_jax import distributed, drawing, inputs, references, weights
from mdt_jax.data import image_sets, sources
from mdt_jax.data.images import save_grid
from mdt_jax.data.pipeline import Source
from mdt_jax.data.sample_files import Npz
from mdt_jax.distributed import is_first, say
from mdt_jax.errors import NotFiniteError, UserError
from mdt_jax.evaluation import Evaluator


def open_evaluator(
    config: ConfigDict, data: Source, held_out: sources.Images | None
) -> Evaluator | None:
    """What measures samples while training and at its end; None where there is nothing to do or
    nothing to measure against. Raises UserError where samples could not be compared.
    """
    asked = config.evaluation
    if not (asked.every or config.sample.num_samples):
        return None
    labelled = not asked.reference and config.model.num_classes > 0
    if asked.reference:
        files = not asked.reference.endswith(".npz") and asked.reference not in sources.PACKAGED
        cut = config.data.image_size if files else None
        reference = references.load(asked.reference, cut)
    elif held_out and isinstance(data, sources.Images):
        reference = references.of_split(config.data.name, data, held_out)
    else:
        return None
    size, images = config.data.image_size, reference.images
    if isinstance(images, image_sets.Files):
        say(f"evaluation.reference {images.found}")
    if images is not None and images.shape != (size, size, config.data.channels):
        there = "×".join(map(str, images.shape))
        raise UserError(
            f"evaluation.reference {asked.reference} has images of {there}, but the config's are "
            f"{size}×{size}×{config.data.channels}"
        )
    pixels = ("pixels", "classifier") if labelled else ("pixels",)
    features = ("inception",) if asked.inception else pixels
    return Evaluator(reference, features, asked.inception)


def identities(found: inputs.Vae | None, evaluator: Evaluator | None) -> dict[str, str]:
    """SHA-256 of what a run reads besides its data, by the config's field that says where it lies.

    All of a reference is read for it, by the first process.
    """
    told = {} if found is None else {"vae.path": found.sha256}
    if evaluator is not None:
        first = evaluator.reference.sha256 if is_first() else ""
        told["evaluation.reference"] = distributed.of_first(first)
        if "inception" in evaluator.networks:
            told["evaluation.inception"] = evaluator.networks["inception"].note["inception_sha256"]
    return told


@contextlib.contextmanager
def going_on_without(what: str):
    """Say it where samples are not finite: an EMA of bad steps may still come right."""
    try:
        yield
    except NotFiniteError as error:
        say(f"warning: {what}: {error}")


def save_sample_grid(path: pathlib.Path, drawer: drawing.Drawer, params) -> None:
    """A PNG of one batch of samples."""
    _, images = next(drawer.samples(params, drawer.config.sample.batch_size).slices())
    if is_first():
        path.parent.mkdir(exist_ok=True)
        save_grid(str(path), images)


def sample_and_measure(
    workdir: pathlib.Path,
    drawer: drawing.Drawer,
    state,
    classes: list[str],
    evaluator: Evaluator | None,
) -> dict:
    """Write samples.npz and samples.png; returns how good they are, where that can be told.

    Raises NotFiniteError.
    """
    started, config, out = time.perf_counter(), drawer.config, workdir / "samples.npz"
    asked = drawer.request(state.ema, config.sample.num_samples)
    of = weights.Weights(drawer.model, state.ema, config, "ema", tuple(classes), int(state.step))
    note = drawing.note_of(str(workdir), of, drawer.options, vae=drawer.vae)
    note |= drawing.note_of_labels(asked.labels, None, asked.seed, asked.batch_size)
    sink = Npz(out, asked.labels, drawer.shape, note)
    if is_first():
        sink.give_way()
    drawing.write_samples(asked, sink, drawer.to_images)
    seconds = time.perf_counter() - started
    distributed.everyone(True)  # the others wait until it is there
    samples = image_sets.open_images(str(out), labelled=True)
    if is_first():
        save_grid(str(workdir / "samples.png"), samples.take(np.arange(min(100, len(samples)))))
    measured = evaluator.measure(samples) if evaluator else {"num_samples": len(samples)}
    return measured | {"sample_seconds": round(seconds, 1)}
