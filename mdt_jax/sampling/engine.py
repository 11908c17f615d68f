"""Evaluations of the network, compiled in segments that the host enqueues one after another.

Which evaluations need guidance, and which take a masked pass, is known in advance. So each segment
is a loop with a static trip count, and no segment waits for the host.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdt_jax.diffusion import samplers
from mdt_jax.diffusion.guidance import guide
from mdt_jax.diffusion.inpainting import Known
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.diffusion.samplers import State
from mdt_jax.models import masking
from mdt_jax.models.mdt import MDT
from mdt_jax.sampling.noise import Noise, draw

# Modulations of a segment that take more memory than this are computed step by step.
MODULATION_BYTES = 2**30

# With a progress bar the evaluations of a batch are cut into about this many segments.
PROGRESS_STEPS = 50


class Segment(NamedTuple):
    """Evaluations of the network in a row that are compiled as one loop.

    guided: evaluate both the conditional and the unconditional half. count: how many evaluations.
    masked: inpainting's masked pass, in which the encoder sees the known tokens alone.
    """

    guided: bool
    count: int
    masked: bool = False


def segments(
    guided: Sequence[bool],
    masked: Sequence[bool],
    ends: Collection[int] = (),
    progress: bool = False,
) -> list[Segment]:
    """Cut a chain of evaluations into segments.

    guided, masked: of each evaluation. ends: numbers of evaluations after which a segment must end.
    progress: cut long segments, so that a progress bar moves.
    """
    parts = [sum(end <= k for end in ends) for k in range(len(guided))]
    groups = itertools.groupby(zip(guided, masked, parts, strict=True))
    whole = [Segment(kind[0], len(list(group)), masked=kind[1]) for kind, group in groups]
    if not progress:
        return whole
    least = -(-len(guided) // PROGRESS_STEPS)
    return [piece for segment in whole for piece in _cut(segment, least)]


def _cut(segment: Segment, least: int) -> list[Segment]:
    """Cut a segment into equal pieces of `least` evaluations or up to five times as many.

    If no such length divides the segment, the last piece is shorter: one more program to compile.
    """
    count = segment.count
    lengths = range(min(least, count), min(5 * least, count) + 1)
    length = next((length for length in lengths if count % length == 0), least)
    pieces, rest = divmod(count, length)
    cut = [segment._replace(count=length)] * pieces
    return [*cut, segment._replace(count=rest)] if rest else cut


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples that are drawn together.

    key: of the seed. labels: [B] int32. scales: [B] float32, guidance scales. guide: parameters of
    the program's. encoder: where it is not evaluated each time, the `encoder_schedule` of the
    options. For inpainting also `known`, and keep_ids: [K] int32, the tokens that are known
    completely.
    """

    key: jax.Array
    noise: Noise
    labels: jax.Array
    scales: jax.Array
    guide: dict | None = None
    encoder: tuple[jax.Array, jax.Array] | None = None
    known: Known | None = None
    keep_ids: jax.Array | None = None


jax.tree_util.register_dataclass(Batch)


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and its sampling options, as jit's static argument: equal programs compile once.

    options: without the guidance scale, which a batch has for each sample. guide: the network of
    guide=network.
    """

    model: MDT
    options: SampleOptions
    guide: MDT | None = dataclasses.field(default=None, kw_only=True)

    def start(self, batch: Batch) -> State:
        """The state of pure noise before the first evaluation."""
        state = self.options.make_sampler().start(draw(self.model, batch.key, batch.noise, 0))
        if batch.encoder is None:
            return state
        networks = [self.model] if self.guide is None else [self.model, self.guide]
        rows = len(batch.labels) * (2 if self.options.guide == "null" else 1)
        return state._replace(
            cache=tuple(
                jnp.zeros(
                    (self.options.encoder_order + 1, rows, each.num_tokens, each.hidden_size),
                    each.dtype,
                )
                for each in networks
            )
        )

    def advance(
        self, network: Callable, batch: Batch, segment: Segment, state: State, start: jax.Array
    ) -> State:
        """Make the evaluations of a segment, the first of which is number `start`."""
        sampler, schedule = self.options.make_sampler(), self.options.schedule()
        noise = self.noise(batch)
        return samplers.sample(network, sampler, schedule, state, noise, start, segment.count)

    def _modulations(self, model: MDT, params, labels: jax.Array, times) -> dict | None:
        """The blocks' modulations at all times: {stack: [blocks, times, B, 6D]}.

        None: without times, and where they would take too much memory.
        """
        width = 6 * model.hidden_size * jnp.dtype(model.dtype).itemsize
        if times is None or len(times) * len(labels) * model.depth * width > MODULATION_BYTES:
            return None
        t, y = times.repeat(len(labels)), jnp.tile(labels, len(times))
        with jax.default_matmul_precision(self.options.precision):
            c: Any = model.apply({"params": params}, t, y, method="conditioning")
            found = model.modulations(params, c)
        shape = len(times), len(labels), -1
        return {name: values.reshape(len(values), *shape) for name, values in found.items()}

    def noise(self, batch: Batch) -> Callable[[jax.Array], jax.Array]:
        """The function from the number of a draw, after that of the start, to [B, H, W, C]."""
        return lambda k: draw(self.model, batch.key, batch.noise, k + 1)

    def times(self, segment: Segment, start: jax.Array) -> jax.Array | None:
        """The timesteps [count] of a segment's evaluations; None: not known in advance."""
        times = self.options.make_sampler().times(self.options.schedule())
        return jax.lax.dynamic_slice(times, (start,), (segment.count,))

    def network(self, params, batch: Batch, segment: Segment, start: jax.Array) -> Callable:
        """The network of a batch in a segment, as `samplers.sample` takes it."""
        count, labels, by = len(batch.labels), batch.labels, self.options.guide
        if segment.guided and by == "null":
            labels = jnp.concatenate([labels, jnp.full_like(labels, self.model.num_classes)])
        strong, weaker = self._evaluator(self.model, params, labels, batch, segment, start), None
        if segment.guided and by != "null":
            model = self.guide or self.model
            weights = params if batch.guide is None else batch.guide
            weaker = self._evaluator(model, weights, batch.labels, batch, segment, start)
        keep_ids = batch.keep_ids if segment.masked else None

        def evaluate(x, t, k=None, cache=(None, None)):
            if not segment.guided:
                out, first = strong(x, t, keep_ids, k, cache[0])
                return out, (first, *cache[1:])
            if weaker is None:
                twice = jnp.concatenate([x, x]), jnp.concatenate([t, t])
                both, first = strong(*twice, keep_ids, k, cache[0])
                out, weak, cache = both[:count], both[count:], (first,)
            else:
                hidden = self._hidden(batch, t) if by == "masked" else keep_ids
                out, first = strong(x, t, keep_ids, k, cache[0])
                weak, second = weaker(x, t, hidden, k, cache[-1])
                cache = first, second
            weight = self.options.weight(t, batch.scales)
            return guide(out, weak, weight, self.options.guidance_channels or None), cache

        return evaluate if batch.encoder is not None else lambda x, t: evaluate(x, t)[0]

    def _evaluator(
        self, model: MDT, params, labels, batch: Batch, segment: Segment, start
    ) -> Callable:
        """(x, t, keep_ids, k, cache) → (output, cache) of a network for labels.

        What does not change within the segment is computed here, before its loop.
        """
        params = model.prepare(params)
        times = self.times(segment, start) if model.modulate_first else None
        modulations = self._modulations(model, params, labels, times)
        of_step = model.unstack_blocks(params)

        def apply(x, t, **others) -> Any:  # Flax annotates `apply` with all that it may return
            params = of_step()
            if modulations is not None:
                step = jnp.argmax(times == t[0])
                params = model.with_modulations(
                    params, {name: values[:, step] for name, values in modulations.items()}
                )
            with jax.default_matmul_precision(self.options.precision):
                return model.apply({"params": params}, x, t, labels, **others)

        def evaluate(x, t, keep_ids, k, cache):
            if cache is None or batch.encoder is None:
                if keep_ids is not None:
                    keep_ids = jnp.broadcast_to(keep_ids, (len(x), keep_ids.shape[-1]))
                return apply(x, t, keep_ids=keep_ids), None
            fresh, weights = batch.encoder
            known = cache[:, : len(x)]  # without guidance, those of the first half

            def encode():
                out, residual = apply(x, t, method="reusing")
                return out, jnp.concatenate([residual[None], known[:-1]])

            def extrapolate():
                residual = (weights[k][:, None, None, None] * known).sum(0).astype(known.dtype)
                return apply(x, t, residual=residual, method="reusing")[0], known

            out, known = jax.lax.cond(fresh[k], encode, extrapolate)
            return out, cache.at[:, : len(x)].set(known)

        return evaluate

    def _hidden(self, batch: Batch, t: jax.Array) -> jax.Array:
        """The tokens that the masked pass of guide=masked keeps at t: [B, K] int32.

        They depend on the seed, the sample's number and t.
        """
        bits = jax.lax.bitcast_convert_type(t[0].astype(jnp.float32), jnp.uint32)

        def uniform(number):
            key = jax.random.fold_in(jax.random.fold_in(batch.key, number), bits)
            # Folded once more, so that it is none of the keys of `draw`.
            return jax.random.uniform(jax.random.fold_in(key, 0), (self.model.num_tokens,))

        length = masking.keep_length(self.model.num_tokens, self.options.guide_ratio)
        return masking.keep_ids(jax.vmap(uniform)(batch.noise.number), length)


@functools.partial(jax.jit, static_argnames="program")
def start(program: Program, batch: Batch) -> State:
    """As `Program.start`."""
    return program.start(batch)


@functools.partial(jax.jit, static_argnames=("program", "segment"), donate_argnames="state")
def run_segment(
    program: Program, segment: Segment, params, batch: Batch, state: State, done
) -> tuple[State, jax.Array]:
    """Run a segment after `done` evaluations (traced) of a batch.

    Returns the state and the new `done`. Unlike the state, `done` is never donated, so that the
    host can wait for it.
    """
    network = program.network(params, batch, segment, done)
    state = program.advance(network, batch, segment, state, done)
    return state, done + segment.count


def run(
    program: Program, chain: Sequence[Segment], params, batch: Batch, bar
) -> Iterator[tuple[int, State]]:
    """Run the segments of a batch; yields (evaluations, state) after each.

    A segment is enqueued before the one before it is done, so that the devices never wait for the
    host. A yielded state is donated to the next segment. bar: a progress bar of evaluations.
    """
    state, enqueued = start(program, batch), 0
    running: list[tuple[jax.Array, int]] = []
    for segment in chain:
        state, done = run_segment(program, segment, params, batch, state, enqueued)
        enqueued += segment.count
        running.append((done, segment.count))
        if len(running) > 1:
            _wait(bar, *running.pop(0))
        yield enqueued, state
    _wait(bar, *running.pop())


def _wait(bar, done: jax.Array, count: int) -> None:
    done.block_until_ready()
    bar.update(count)
