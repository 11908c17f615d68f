"""Labels → samples, batch by batch."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mdt_jax.diffusion.options import (
    SampleOptions,
    check_finite,
    check_labels,
    check_seed,
    defaults,
)
from mdt_jax.models import xla
from mdt_jax.models.masking import keep_length
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts, keys, parallel, progress
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import progress_bar
from mdt_jax.sampling import engine
from mdt_jax.sampling.engine import Batch, Program
from mdt_jax.sampling.noise import Noise

Labels = Sequence[int] | np.ndarray


class Samples(NamedTuple):
    """A batch of samples.

    start: number of the first one in the request. samples: [n, H, W, C] float32. predictions: the
    predicted clean samples x̂₀ at earlier moments that were requested, each like `samples`.
    """

    start: int
    samples: np.ndarray
    predictions: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Request:
    """Samples to draw, checked.

    labels, scales: [N] int32 and float32. noise: of N samples. batch_size: the most that are drawn
    at a time. guide: the network and parameters of guide=network.
    """

    model: MDT
    params: dict
    options: SampleOptions
    labels: np.ndarray
    scales: np.ndarray
    noise: Noise
    seed: int
    batch_size: int
    guide: tuple[MDT, dict] | None = dataclasses.field(default=None, kw_only=True)
    purpose: ClassVar[keys.Purpose] = keys.Purpose.SAMPLES
    title: ClassVar[str] = "sampling"

    def draw(self, progress: bool = False) -> np.ndarray:
        """All samples: [N, H, W, C] float32. Raises NotFiniteError."""
        empty = np.zeros((0, *self.model.input_size, self.model.in_channels), np.float32)
        return np.concatenate([empty, *(batch.samples for batch in self.batches(progress))])

    def batches(
        self, progress: bool = False, *, frames: int = 1, done: Collection[int] = ()
    ) -> Iterator[Samples]:
        """Draw batch by batch.

        frames: number of moments to return, evenly spaced: `frames` − 1 predictions and the
        samples. done: the `start` of batches to leave out, the same in every process. Raises
        NotFiniteError before a batch that is not finite.
        """
        mesh, params, key = self.on_devices()
        program, guided, masked = self.program(), *self.evaluations()
        total = len(guided)
        moments = [round(total * frame / frames) for frame in range(1, frames + 1)]
        chain = engine.segments(guided, masked, moments, progress)
        shared = self.shared(guided, mesh)
        starts = range(0, len(self.labels), self.batch_size)
        left = [start for start in starts if start not in done]
        show, drawn = progress and hosts.is_first(), len(starts) - len(left)
        with progress_bar(len(starts) * total, show, self.title, "step", drawn * total) as bar:
            for start in left:
                batch, arrays = dataclasses.replace(self.batch(start, key, mesh), **shared), []
                for count, state in engine.run(program, chain, params, batch, bar):
                    if count in moments:
                        arrays.append(self.fetch(state.x if count == total else state.x0, start))
                *predictions, samples = arrays
                yield Samples(start, samples, predictions)

    def program(self) -> Program:
        """What is compiled."""
        platform = jax.default_backend()
        progress.log_once(xla.refusal(self.model, platform))
        mesh = parallel.mesh_of(self.params)
        model = xla.for_devices(self.model, platform, mesh.size, mesh)
        guide = self.guide and xla.for_devices(self.guide[0], platform, mesh.size, mesh)
        return Program(model, dataclasses.replace(self.options, guidance_scale=1.0), guide=guide)

    def evaluations(self) -> tuple[list[bool], list[bool]]:
        """For each evaluation of the network: whether it is guided, and whether it is masked."""
        guided = self.options.guided_evaluations(self.scales).tolist()
        return guided, [False] * len(guided)

    def on_devices(self) -> tuple[Mesh, dict, jax.Array]:
        """(mesh, parameters, the seed's key), the arrays on every device of the mesh."""
        mesh = parallel.mesh_of(self.params)
        whole = parallel.replicated(mesh)
        of_seed = functools.partial(keys.of, purpose=self.purpose)
        key = jax.jit(of_seed, out_shardings=whole)(self.seed)
        return mesh, parallel.put(self.params, whole), key

    def shared(self, guided: Sequence[bool], mesh: Mesh) -> dict[str, Any]:
        """The fields of all batches that are alike, on every device of the mesh."""
        fields: dict[str, Any] = {}
        if self.guide is not None:
            fields["guide"] = self.guide[1]
        if self.options.encoder_every > 1:
            fields["encoder"] = self.options.encoder_schedule(guided)
        return parallel.put(fields, parallel.replicated(mesh))

    def rows(self, start: int, mesh: Mesh) -> np.ndarray:
        """The numbers of a batch's samples, the last one repeated.

        All batches have one shape, a multiple of the devices, so that the program compiles once.
        """
        total = len(self.labels)
        padded = -(-min(self.batch_size, total) // mesh.size) * mesh.size
        return np.minimum(start + np.arange(padded), min(start + self.batch_size, total) - 1)

    def batch(self, start: int, key: jax.Array, mesh: Mesh) -> Batch:
        """The batch from sample `start` on, split over the devices."""
        rows = self.rows(start, mesh)
        split = jax.tree.map(lambda array: array[rows], (self.noise, self.labels, self.scales))
        return Batch(key, *parallel.put(split, parallel.split_batch(mesh)))

    def fetch(self, array: jax.Array, start: int) -> np.ndarray:
        """The array of a batch without its padding. Raises NotFiniteError."""
        fetched = hosts.fetch(array)[: min(self.batch_size, len(self.labels) - start)]
        check_finite(fetched, lambda i: f"sample {self.noise.number[start + i]}")
        return fetched


def request(
    model: MDT,
    params: dict,
    labels: Labels,
    *,
    seed: int = 0,
    batch_size: int = 64,
    options: SampleOptions | None = None,
    guidance_scale: float | Sequence[float] | np.ndarray | None = None,
    guide_network: tuple[MDT, dict] | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    **changes,
) -> Request:
    """Check the arguments of `generate`, which describes them. Raises UserError."""
    if guidance_scale is not None and not np.ndim(guidance_scale):
        changes["guidance_scale"] = guidance_scale
    options = changed(options or defaults(model.num_classes), changes)
    options = options.clipping_for(model.in_channels in (1, 3))
    scales = [options.guidance_scale]
    if guidance_scale is not None and np.ndim(guidance_scale):
        scales = np.asarray(guidance_scale)
        if len(scales) != np.size(labels) or scales.dtype.kind not in "iuf":
            raise UserError(
                f"guidance_scale is {len(scales)} values for {np.size(labels)} samples; give one, "
                "or a number for each"
            )
    for scale in dict.fromkeys(np.asarray(scales, object)):
        dataclasses.replace(options, guidance_scale=scale).check(model.num_classes)
    guide = _checked_guide(model, options, guide_network)
    each = (dataclasses.replace(options, guidance_scale=scale) for scale in scales)
    if options.guide != "null" and not any(one.guided for one in each):
        raise UserError(f"guide={options.guide} has no effect without guidance; raise the scale")
    check_labels(labels, model.num_classes)
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be a whole number from 1")
    check_seed(seed)
    scales = np.resize(scales, len(labels)).astype(np.float32)
    noise = Noise(_checked_numbers(numbers, len(labels)))
    labels = np.asarray(labels, np.int32)
    return Request(
        model, params, options, labels, scales, noise, seed, int(batch_size), guide=guide
    )


def _checked_guide(
    model: MDT, options: SampleOptions, network: tuple[MDT, dict] | None
) -> tuple[MDT, dict] | None:
    """The network of guide=network. Raises UserError for one that cannot guide a model."""
    if options.guide == "masked":
        if not model.decoder_layers:
            raise UserError("guide=masked: a DiT has no masked pass")
        if keep_length(model.num_tokens, options.guide_ratio) < 1:
            raise UserError(
                f"guide_ratio {options.guide_ratio} leaves none of the {model.num_tokens} tokens"
            )
    if options.guide != "network":
        if network is not None:
            raise UserError(f"guide_network has no effect with guide={options.guide}")
        return None
    if network is None:
        raise UserError("guide=network takes guide_network, a model and its parameters")
    guide = network[0]
    for name in ("input_size", "in_channels"):
        theirs, wanted = getattr(guide, name), getattr(model, name)
        if theirs != wanted:
            raise UserError(f"the guide has {name} {theirs}, but the network has {wanted}")
    if guide.num_classes not in (0, model.num_classes):
        raise UserError(
            f"the guide has {guide.num_classes} classes, but the network has {model.num_classes}"
        )
    return guide, network[1]


def changed(options: SampleOptions, changes: Mapping[str, Any]) -> SampleOptions:
    """The options with other values for some of them. Raises UserError for an unknown name."""
    known = [field.name for field in dataclasses.fields(SampleOptions)]
    unknown = changes.keys() - known
    if unknown:
        raise UserError(f"unknown option {min(unknown)!r}; choose from {', '.join(known)}")
    # An option that belongs to one that is switched off goes with it.
    published = SampleOptions()
    if changes.get("guide", "masked") != "masked":
        changes = {"guide_ratio": published.guide_ratio, **changes}
    if changes.get("encoder_every") == 1:
        changes = {"encoder_order": published.encoder_order, **changes}
    return dataclasses.replace(options, **changes)


def _checked_numbers(numbers: Sequence[int] | np.ndarray | None, count: int) -> np.ndarray:
    """[count] int32, 0, 1, … by default. Raises UserError."""
    if numbers is None:
        return np.arange(count, dtype=np.int32)
    if np.shape(numbers) != (count,):
        raise UserError(f"numbers of shape {np.shape(numbers)} for {count} samples; one each")
    for number in numbers:
        if not isinstance(number, Integral) or not 0 <= int(number) < 2**31:
            raise UserError(f"number {number!r} is no whole number in [0, 2^31)")
    return np.asarray(numbers, np.int32)


def generate(
    model: MDT,
    params: dict,
    labels: Labels,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    options: SampleOptions | None = None,
    guidance_scale: float | Sequence[float] | np.ndarray | None = None,
    guide_network: tuple[MDT, dict] | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    **changes,
) -> np.ndarray:
    """Draw one sample for each label.

    labels: N ints in 0…num_classes−1. An unconditional model uses only their number.
    seed: sample n depends on the seed, n, its label and its guidance scale alone, not on batch_size
    or the devices. numbers: N ints that replace n, to draw some of many samples, or several from
    the same noise.
    options, changes: SampleOptions, for example the `options` of `mdt_jax.load`'s result (default:
    the published ones), and fields of it by name, for example num_steps=250 or sampler="ddim".
    guidance_scale: one scale, or one for each sample. guide_network: with guide="network", a weaker
    network and its parameters, which predicts what the model predicts. clip_denoised: unless given,
    on for a model of 1 or 3 channels, whose samples are taken for pixels.
    Returns [N, H, W, C] float32 of the kind that the model was trained on: pixels, about in
    [−1, 1] (`mdt_jax.to_uint8` converts them to images), or latents. `model.clone(
    dtype=jnp.bfloat16)` computes in bfloat16. Raises UserError for invalid arguments, and
    NotFiniteError for samples that are not finite.
    """
    return request(
        model, params, labels, seed=seed, batch_size=batch_size, options=options,
        guidance_scale=guidance_scale, guide_network=guide_network, numbers=numbers, **changes,
    ).draw(progress)  # fmt: skip
