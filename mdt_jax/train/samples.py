"""What a run in training shows of its samples: grids, measurements, and those at its end."""

import dataclasses
import pathlib
import time
from collections.abc import Collection, Sequence

import numpy as np
from ml_collections import ConfigDict

from mdt_jax.data import sources
from mdt_jax.data.images import save_grid
from mdt_jax.data.protocols import Source
from mdt_jax.data.sample_files import Npz
from mdt_jax.data.sample_notes import written
from mdt_jax.diffusion.options import balanced_labels
from mdt_jax.evaluation import references
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.image_sets import Slices, open_images
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import is_first, log0
from mdt_jax.sampling.generation import Request
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.sampling.writing import write_samples
from mdt_jax.train.state import TrainState
from mdt_jax.weights.networks import Weights
from mdt_jax.weights.vae import Vae


@dataclasses.dataclass(frozen=True)
class LazySamples:
    """Samples as an `ImageSet`, drawn as they are read, never kept."""

    pipeline: Pipeline
    request: Request
    path = "the samples"
    classes = ()

    def __len__(self) -> int:
        return len(self.request.labels)

    @property
    def labels(self) -> np.ndarray:
        return self.request.labels

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pipeline.image_shape

    def name(self, i: int) -> str:
        return f"sample {i}"

    def slices(self, size: int = 0, done: Collection[int] = ()) -> Slices:
        """The batches of the request; their size is its own."""
        for batch in self.request.batches(done=done):
            images = self.pipeline.to_images(batch.samples, self.request.batch_size, batch.start)
            yield batch.start, images


class RunSampler:
    """Draws samples of a run in training as its config says; the same noise each time."""

    def __init__(self, config: ConfigDict, model: MDT, vae: Vae | None):
        self.config, self.model, self.vae = config, model, vae

    def pipeline(
        self, params, path: str = "", step: int | None = None, classes: Sequence[str] = ()
    ) -> Pipeline:
        weights = Weights(self.model, params, self.config, "ema", tuple(classes), step)
        return Pipeline(path, weights, vae=self.vae)

    def request(self, pipeline: Pipeline, count: int) -> Request:
        labels = balanced_labels(count, self.model.num_classes)
        size, seed = self.config.sample.batch_size, self.config.train.seed
        return pipeline.request(labels, seed=seed, batch_size=size)

    def samples(self, params, count: int) -> LazySamples:
        pipeline = self.pipeline(params)
        return LazySamples(pipeline, self.request(pipeline, count))


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
    if images is not None and images.summary:
        log0(f"evaluation.reference {images.summary}")
    if images is not None and images.shape != (size, size, config.data.channels):
        there = "×".join(map(str, images.shape))
        raise UserError(
            f"evaluation.reference {asked.reference} has images of {there}, but the config's are "
            f"{size}×{size}×{config.data.channels}"
        )
    pixels = ("pixels", "classifier") if labelled else ("pixels",)
    features = ("inception",) if asked.inception else pixels
    return Evaluator(reference, features, asked.inception)


def save_sample_grid(
    path: pathlib.Path, sampler: RunSampler, state: TrainState, classes: list[str]
) -> None:
    """Write a PNG of one batch of samples, with a note of how they are made."""
    size = sampler.config.sample.batch_size
    pipeline = sampler.pipeline(state.ema, str(path.parents[1]), int(state.step), classes)
    request = sampler.request(pipeline, size)
    images = pipeline.to_images(request.draw(progress=True), size)
    if is_first():
        path.parent.mkdir(exist_ok=True)
        save_grid(str(path), images, note=written(pipeline.note(request)))


def sample_and_measure(
    workdir: pathlib.Path,
    sampler: RunSampler,
    state: TrainState,
    classes: list[str],
    evaluator: Evaluator | None,
) -> dict:
    """Write samples.npz and samples.png; returns how good they are, where that can be told.

    Raises NotFiniteError.
    """
    started, out = time.perf_counter(), workdir / "samples.npz"
    pipeline = sampler.pipeline(state.ema, str(workdir), int(state.step), classes)
    request = sampler.request(pipeline, sampler.config.sample.num_samples)
    note = pipeline.note(request)
    sink = Npz(out, request.labels, pipeline.image_shape, note)
    if is_first():
        sink.give_way()
    write_samples(pipeline, request, sink)
    seconds = time.perf_counter() - started
    hosts.all_hosts(True)  # the others wait until it is there
    samples = open_images(str(out), labelled=True)
    if is_first():
        shown = samples.take(np.arange(min(100, len(samples))))
        text = written(note)
        save_grid(str(workdir / "samples.png"), shown, note=text)
    measured = (
        evaluator.measure(samples, progress=True) if evaluator else {"num_samples": len(samples)}
    )
    return measured | {"sample_seconds": round(seconds, 1)}
