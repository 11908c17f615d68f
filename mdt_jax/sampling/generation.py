"""Labels → samples: guidance, sampler and noise put together, batch by batch."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from numbers import Integral
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mdt_jax.diffusion.guidance import guide
from mdt_jax.diffusion.options import (
    SampleOptions,
    check_finite,
    check_labels,
    check_seed,
    defaults,
)
from mdt_jax.diffusion.samplers import State, sample
from mdt_jax.models import xla
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts, keys, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import progress_bar

# Where the progress is shown, a batch is drawn in about so many pieces.
PARTS = 50


@dataclasses.dataclass(frozen=True)
class Noise:
    """Which noise samples are drawn with: [B] numbers, or on the way to those of `to`, [B].

    mix: [B] in [0, 1], how far on the way (`slerp`); given with `to`.
    """

    number: jax.Array | np.ndarray
    to: jax.Array | np.ndarray | None = None
    mix: jax.Array | np.ndarray | None = None


jax.tree_util.register_dataclass(Noise)


def slerp(a: jax.Array, b: jax.Array, mix: jax.Array) -> jax.Array:
    """Along the great circle from a to b, so that noise between them is as large as noise is.

    a, b: arrays of one shape, each taken as one vector; mix: scalar in [0, 1]. Shoemake 1985.
    """
    cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    alike = jnp.sin(angle) < 1e-3  # also a itself
    safe = jnp.where(alike, 1.0, jnp.sin(angle))
    from_a = jnp.where(alike, 1 - mix, jnp.sin((1 - mix) * angle) / safe)
    return from_a * a + jnp.where(alike, mix, jnp.sin(mix * angle) / safe) * b


def draw(model: MDT, key: jax.Array, noise: Noise, k: jax.Array | int) -> jax.Array:
    """Draw number k of each sample, [B, H, W, C] standard normal."""
    shape = (*model.input_size, model.in_channels)

    def one(n):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, n), k), shape)

    drawn = jax.vmap(one)(noise.number)
    if noise.to is None:
        return drawn
    mix = cast(jax.Array, noise.mix)
    return jax.vmap(slerp)(drawn, jax.vmap(one)(noise.to), mix)


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _begin(model: MDT, options: SampleOptions, key, noise: Noise) -> State:
    return options.make_sampler().start(draw(model, key, noise, 0))


def network_of(
    model: MDT, params, labels, options: SampleOptions, scales, doubled: bool, keep_ids=None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The network (x, t) → [B, H, W, 2C] for labels [B] and scales [B], guided if `doubled`.

    keep_ids: [K], what is known of every sample, for a masked pass.
    """
    model = xla.for_devices(model, jax.default_backend(), jax.device_count())
    stacked = model.unstack_blocks(params)

    def network(x, t, y) -> Any:  # Flax annotates `apply` with all that it may return
        ids = None if keep_ids is None else jnp.broadcast_to(keep_ids, (len(x), len(keep_ids)))
        with jax.default_matmul_precision(options.precision):
            return model.apply({"params": stacked()}, x, t, y, keep_ids=ids)

    if not doubled:
        return functools.partial(network, y=labels)
    channels = options.guidance_channels or None
    weight = functools.partial(options.weight, scale=scales)
    return guide(network, labels, model.num_classes, weight, channels)


Stretch = tuple[bool, int]  # whether both halves are evaluated, and for how many evaluations


def stretches(kinds: Sequence[bool]) -> tuple[Stretch, ...]:
    """Runs of equal values in a row: (value, how many), in order."""
    return tuple((kind, len(list(run))) for kind, run in itertools.groupby(kinds))


@functools.partial(jax.jit, static_argnames=("model", "options", "piece"), donate_argnames="state")
def _run(
    model: MDT, options, piece, params, key, noise, labels, scales, state, start
):  # fmt: skip
    """Make the evaluations of some stretches from `state` on, the first one being number `start`.

    Returns the state, and the number of the next evaluation, which is there when the state is.
    """

    def noise_at(k):
        return draw(model, key, noise, k + 1)

    for doubled, count in piece:
        network = network_of(model, params, labels, options, scales, doubled)
        sampler, schedule = options.make_sampler(), options.schedule()
        state = sample(network, sampler, schedule, state, noise_at, start, count)
        start = start + count
    return state, start


def pieces(stretches_: tuple[Stretch, ...], progress: bool) -> list[tuple[Stretch, ...]]:
    """All in one piece, or where progress is to be shown in about PARTS.

    Of equal length where they can be: each length is a program to compile.
    """
    if not progress:
        return [stretches_]
    least = -(-sum(count for _, count in stretches_) // PARTS)
    cut = []
    for kind, count in stretches_:
        lengths = range(min(least, count), min(5 * least, count) + 1)
        length = next((n for n in lengths if count % n == 0), least)
        cut += [((kind, length),)] * (count // length)
        cut += [((kind, count % length),)] if count % length else []
    return cut


def frame_pieces(stretches_: tuple[Stretch, ...], frames: int) -> list[tuple[Stretch, ...]]:
    """As many pieces as frames, of nearly equal length."""
    kinds = [kind for kind, count in stretches_ for _ in range(count)]
    ends = [round(len(kinds) * frame / frames) for frame in range(frames + 1)]
    return [stretches(kinds[a:b]) for a, b in itertools.pairwise(ends)]


def in_pieces(
    run: Callable, state, cut: list[tuple[Stretch, ...]], moved: Callable[[int], object]
) -> Iterator[Any]:
    """Call run(piece, state, start) → (state, next start) for each piece; yield the states.

    A piece is handed to the devices before the one before is done. moved: told of evaluations done.
    """
    done, waiting = 0, None
    for piece in cut:
        state, ready = run(piece, state, done)
        count = sum(count for _, count in piece)
        if waiting is not None:
            waiting[0].block_until_ready()
            moved(waiting[1])
        waiting, done = (ready, count), done + count
        yield state
    if waiting is not None:
        waiting[0].block_until_ready()
        moved(waiting[1])


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be drawn, checked and ready for the devices.

    labels, scales: [N] int32 and float32. numbers: [N] int32, whose noise each sample is drawn
    with. to, mix: as in `Noise`, [N], or None.
    """

    model: MDT
    params: dict
    options: SampleOptions
    labels: np.ndarray
    scales: np.ndarray
    numbers: np.ndarray
    to: np.ndarray | None
    mix: np.ndarray | None
    seed: int
    batch_size: int

    def batches(
        self, frames: int = 0, progress: bool = False, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(first sample, what `frames` says) batch by batch.

        frames: 0: the samples [n, H, W, C]; else so many predictions of them on the way, each
        [n, H, W, C], the last one being the samples. done: the first samples of batches that are
        not drawn; the same in every process. Raises NotFiniteError before a batch with NaN or
        infinity is handed on.
        """
        mesh, params, key = self.on_devices()
        doubled = self.options.guided_evaluations(self.scales).tolist()
        whole, total = stretches(doubled), len(doubled)
        cut = frame_pieces(whole, frames) if frames else pieces(whole, progress)
        options = self.traced_options()
        batches = self.rows(mesh)
        left = [each for each in batches if each[0] not in done]
        show, before = progress and jax.process_index() == 0, (len(batches) - len(left)) * total
        with progress_bar(len(batches) * total, show, "sampling", "step", before) as bar:
            for start, count, rows in left:
                inputs = self.inputs(rows, mesh)

                def run(piece, state, at, inputs=inputs):
                    return _run(self.model, options, piece, params, key, *inputs, state, at)

                first, seen = _begin(self.model, options, key, inputs[0]), []
                for state in in_pieces(run, first, cut, bar.update):
                    if frames:
                        seen.append(hosts.fetch(state.x0))
                seen = [a[:count] for a in (*seen[:-1], hosts.fetch(state.x))]
                for array in seen:
                    check_finite(array, lambda i, rows=rows: f"sample {self.numbers[rows[i]]}")
                yield start, seen

    def on_devices(self, purpose=keys.Purpose.SAMPLES) -> tuple[Mesh, dict, jax.Array]:
        """(mesh, parameters, the seed's key for a purpose), as they lie on the devices."""
        mesh = parallel.mesh_of(self.params)
        whole = parallel.replicated(mesh)
        key = jax.jit(functools.partial(keys.of, purpose=purpose), out_shardings=whole)(self.seed)
        return mesh, parallel.put(self.params, whole), key

    def traced_options(self) -> SampleOptions:
        """The options without the scale, which comes to the program as an array."""
        return dataclasses.replace(self.options, guidance_scale=1.0)

    def rows(self, mesh: Mesh) -> list[tuple[int, int, np.ndarray]]:
        """(first sample, how many, their numbers and some again) of each batch.

        All have one shape, a multiple of the devices, so that the program compiles once.
        """
        total = len(self.labels)
        size = max(min(self.batch_size, total), 1)
        each = np.arange(-(-size // mesh.size) * mesh.size)
        return [
            (start, count, start + np.minimum(each, count - 1))
            for start in range(0, total, size)
            for count in (min(size, total - start),)
        ]

    def inputs(self, rows: np.ndarray, mesh: Mesh) -> tuple[Noise, jax.Array, jax.Array]:
        """(noise, labels, scales) of the samples `rows`, split over the devices."""
        way = (None if array is None else array[rows] for array in (self.to, self.mix))
        noise = Noise(self.numbers[rows], *way)
        chosen = (noise, self.labels[rows], self.scales[rows])
        return parallel.put(chosen, parallel.split_batch(mesh))


def request(
    model: MDT,
    params: dict,
    labels: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    batch_size: int = 64,
    options: SampleOptions | None = None,
    guidance_scale: float | Sequence[float] | np.ndarray | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    to: Sequence[int] | np.ndarray | None = None,
    mix: Sequence[float] | np.ndarray | None = None,
    **changes,
) -> Request:
    """Check what `generate` is asked for; arguments are its own. Raises UserError."""
    scales = None
    if guidance_scale is not None and np.ndim(guidance_scale):
        scales = np.asarray(guidance_scale)
    elif guidance_scale is not None:
        changes["guidance_scale"] = guidance_scale
    try:
        options = dataclasses.replace(options or defaults(model.num_classes), **changes)
        options = options.clipping_for(model.in_channels in (1, 3))
    except TypeError as error:
        raise UserError(f"generate: {error}") from None
    if scales is not None:
        if len(scales) != len(labels) or scales.dtype.kind not in "iuf":
            raise UserError(
                f"guidance_scale is {len(scales)} values for {len(labels)} samples; give one, or "
                "a number for each"
            )
        for scale in np.unique(scales).tolist():
            dataclasses.replace(options, guidance_scale=scale).check(model.num_classes)
    else:
        options.check(model.num_classes)
    check_labels(labels, model.num_classes)
    labels = np.asarray(labels, np.int32)
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be a whole number from 1")
    check_seed(seed)
    scales = np.resize(options.guidance_scale if scales is None else scales, len(labels))
    numbers = range(len(labels)) if numbers is None else numbers
    if np.shape(numbers) != labels.shape:
        raise UserError(f"numbers of shape {np.shape(numbers)} for {len(labels)} samples; one each")
    for number in numbers:
        if not isinstance(number, Integral) or not 0 <= int(number) < 2**31:
            raise UserError(f"number {number!r} is no whole number in [0, 2^31)")
    return Request(
        model,
        params,
        options,
        labels,
        scales.astype(np.float32),
        np.asarray(numbers, np.int32),
        None if to is None else np.asarray(to, np.int32),
        None if mix is None else np.asarray(mix, np.float32),
        seed,
        batch_size,
    )


def generate(
    model: MDT,
    params: dict,
    labels: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    options: SampleOptions | None = None,
    guidance_scale: float | Sequence[float] | np.ndarray | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    **changes,
) -> np.ndarray:
    """Draw one sample for each label.

    labels: N ints in 0…num_classes−1 (an unconditional model reads only how many there are).
    seed: sample n depends on (seed, n, its label and guidance scale) alone, not on batch_size or
    the devices. numbers: another n for each sample, to draw some of many, or with equal noise.
    options, changes: a SampleOptions, such as the `options` of what `mdt_jax.load` gives (default:
    the published ones), and fields of it by name, such as num_steps=250 or sampler="ddim".
    guidance_scale may also be N numbers, one for each sample. clip_denoised is on by default where
    the model has 1 or 3 channels, which are taken for pixels, unless options say.
    Returns [N, H, W, C] float32, what the model was trained on: pixels in about [−1, 1]
    (`mdt_jax.to_uint8` makes images of them), or latents. `model.clone(dtype=jnp.bfloat16)`
    computes in bfloat16. Raises UserError for options and labels that make no sense, and for
    samples that are not finite.
    """
    asked = request(
        model, params, labels, seed=seed, batch_size=batch_size, options=options,
        guidance_scale=guidance_scale, numbers=numbers, **changes,
    )  # fmt: skip
    drawn = [np.zeros((0, *model.input_size, model.in_channels), np.float32)]
    drawn += [seen[-1] for _, seen in asked.batches(progress=progress)]
    return np.concatenate(drawn)
