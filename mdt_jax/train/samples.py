"""Samples of a run in training: grids, samples to measure, and the samples at its end."""

import dataclasses
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
from mdt_jax.models.mdt import MDT, image_sides
from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import Path
from mdt_jax.runtime.hosts import is_first, log0
from mdt_jax.sampling.generation import Request
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.sampling.writing import write_samples
from mdt_jax.train.state import TrainState
from mdt_jax.weights.kinds import Weights
from mdt_jax.weights.vae import Vae


@dataclasses.dataclass(frozen=True)
class LazySamples:
    """Samples as an `ImageSet`: they are drawn as they are read, and not kept."""

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
    """Draws samples of a run in training with its config's options, each time of the same noise."""

    def __init__(self, config: ConfigDict, model: MDT, vae: Vae | None):
        self.config, self.model, self.vae = config, model, vae

    def pipeline(
        self, params, path: str = "", step: int | None = None, classes: Sequence[str] = ()
    ) -> Pipeline:
        """The pipeline of parameters in memory; path, step and classes are for its note."""
        weights = Weights(self.model, params, self.config, "ema", tuple(classes), step)
        return Pipeline(path, weights, vae=self.vae)

    def request(self, pipeline: Pipeline, count: int) -> Request:
        """A request for `count` samples of balanced classes."""
        labels = balanced_labels(count, self.model.num_classes)
        size, seed = self.config.sample.batch_size, self.config.train.seed
        return pipeline.request(labels, seed=seed, batch_size=size)

    def samples(self, params, count: int) -> LazySamples:
        """`count` samples of parameters, to be measured."""
        pipeline = self.pipeline(params)
        return LazySamples(pipeline, self.request(pipeline, count))


def open_evaluator(
    config: ConfigDict, data: Source, held_out: sources.Images | None
) -> Evaluator | None:
    """The evaluator of samples in training and at its end.

    None where no samples are measured, or where there is no reference to compare them with. Raises
    UserError where the reference does not fit the config.
    """
    evaluation = config.evaluation
    if not (evaluation.every or config.sample.num_samples):
        return None
    path = evaluation.reference
    labelled = not path and config.model.num_classes > 0
    if path:
        is_files = not path.endswith(".npz") and path not in sources.PACKAGED
        reference = references.load(path, image_sides(config) if is_files else None)
    elif held_out and isinstance(data, sources.Images):
        reference = references.of_split(config.data.name, data, held_out)
    else:
        return None
    (height, width), images = image_sides(config), reference.images
    if images is not None and images.summary:
        log0(f"evaluation.reference {images.summary}")
    if images is not None and images.shape != (height, width, config.data.channels):
        shape = "×".join(map(str, images.shape))
        raise UserError(
            f"evaluation.reference {path} has images of {shape}, but the config's are "
            f"{height}×{width}×{config.data.channels}"
        )
    pixels = ("pixels", "classifier") if labelled else ("pixels",)
    features = ("inception",) if evaluation.inception else pixels
    return Evaluator(reference, features, evaluation.inception)


def save_sample_grid(
    path: Path, sampler: RunSampler, state: TrainState, classes: list[str]
) -> None:
    """Write a PNG of one batch of samples, with a note of how they are made."""
    size = sampler.config.sample.batch_size
    pipeline = sampler.pipeline(state.ema, str(path.parents[1]), int(state.step), classes)
    request = sampler.request(pipeline, size)
    note = pipeline.note(request)  # hashes parameters of all processes
    images = pipeline.to_images(request.draw(progress=True), size)
    if is_first():
        path.parent.mkdir(exist_ok=True)
        save_grid(str(path), images, note=written(note))


def sample_and_measure(
    workdir: Path,
    sampler: RunSampler,
    state: TrainState,
    classes: list[str],
    evaluator: Evaluator | None,
) -> dict:
    """Write samples.npz and samples.png, and measure the samples where there is an evaluator.

    Returns the metrics, or the number of samples alone. Raises NotFiniteError.
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
    hosts.all_hosts(True)  # the others wait for the file
    samples = open_images(str(out), labelled=True)
    if is_first():
        shown = samples.take(np.arange(min(100, len(samples))))
        save_grid(str(workdir / "samples.png"), shown, note=written(note))
    metrics = {"num_samples": len(samples)}
    if evaluator is not None:
        metrics = evaluator.measure(samples, progress=True)
    return metrics | {"sample_seconds": round(seconds, 1)}
