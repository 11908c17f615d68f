"""Samplers: the update of x after each evaluation of the network, and the loop over evaluations.

Notation: α = √ᾱ, σ = √(1 − ᾱ) and λ = log(α/σ) at a step of the schedule; α', σ' and λ' at the
next, less noisy step. After the last step x' is the sample: α' = 1, σ' = 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import schedule as sch


class State(NamedTuple):
    """x: [B, H, W, C] float32, the network's next input; x0: the last x̂_0 predicted, like x;
    memory: further arrays of the sampler; cache: arrays of the network, if it has any."""

    x: jax.Array
    x0: jax.Array
    memory: tuple[jax.Array, ...] = ()
    cache: Any = None


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The base of all samplers: one evaluation for each step of the schedule, and no memory.

    limit: each x̂_0 is clipped to ±limit, and ε computed from the clipped x̂_0. None: no clipping.
    objective: what the network predicts.
    """

    limit: float | None = dataclasses.field(default=None, kw_only=True)
    objective: str = dataclasses.field(default="epsilon", kw_only=True)
    remembers = False  # whether a step depends on earlier ones

    def indices(self, num_steps: int) -> np.ndarray:
        """The schedule's step of each evaluation, from the noisiest on: [evaluations] int."""
        return np.arange(num_steps)[::-1]

    def times(self, schedule: sch.Schedule) -> jax.Array:
        """The network's time at each evaluation: [evaluations] int32, or float32."""
        return visited(schedule, self.indices(schedule.num_steps))

    def start(self, x: jax.Array) -> State:
        """The initial state; x: [B, H, W, C] float32, standard normal."""
        return State(x, jnp.zeros_like(x))

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        """The state after evaluation k (a scalar, from 0).

        out: [B, H, W, 2C], the network's output; noise: [B, H, W, C], standard normal.
        """
        raise NotImplementedError

    def predict(self, schedule: sch.Schedule, x, i, out) -> tuple[jax.Array, jax.Array]:
        """(x̂_0, ε) of the network's output [B, H, W, 2C] at steps i [B]."""
        predicted = jnp.split(out, 2, axis=-1)[0]
        if self.objective == "epsilon":
            x0, eps = sch.predict_x0(schedule, x, i, predicted), predicted
        else:
            x0 = sch.predict_x0_from_v(schedule, x, i, predicted)
            eps = sch.predict_eps_from_v(schedule, x, i, predicted)
        if self.limit is None:
            return x0, eps
        # Not-finite values are kept: they are reported when sampling ends.
        clipped = jnp.where(jnp.isfinite(x0), jnp.clip(x0, -self.limit, self.limit), x0)
        # Where nothing was clipped, the network's ε is kept: computing it anew would round it.
        return clipped, jnp.where(clipped == x0, eps, sch.predict_eps(schedule, x, i, clipped))


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling with the learned variance: x' = μ(x, x̂_0) + 1[not last]·σ_learned·noise.

    Ho et al. 2020, arXiv 2006.11239, algorithm 2; the variance of Nichol & Dhariwal 2021, arXiv
    2102.09672, equation 15.
    """

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        x, i = state.x, _index(schedule, state, k)
        x0, _ = self.predict(schedule, x, i, out)
        v = jnp.split(out, 2, axis=-1)[1]
        mean = sch.posterior_mean(schedule, x0, x, i)
        std = jnp.exp(0.5 * sch.learned_log_variance(schedule, v, i))
        return State(mean + jnp.where(i > 0, 1.0, 0.0)[:, None, None, None] * std * noise, x0)


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """x' = α'·x̂_0 + √(σ'² − s²)·ε + s·noise, s = η·(σ'/σ)·√(1 − α²/α'²); η in [0, 1].

    Song et al. 2021, arXiv 2010.02502, equations 12 and 16. η = 0 is deterministic; η = 1 is
    ancestral sampling with the posterior's variance.
    """

    eta: float = 0.0

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        i = _index(schedule, state, k)
        x0, eps = self.predict(schedule, state.x, i, out)
        previous = schedule.alphas_cumprod_prev
        variance = self.eta**2 * schedule.posterior_variance
        x = sch.extract(np.sqrt(previous), i) * x0
        x = x + sch.extract(np.sqrt(1 - previous - variance), i) * eps
        if self.eta:
            x = x + sch.extract(np.sqrt(variance), i) * noise
        return State(x, x0)


@dataclasses.dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M), a multistep solver of order 2, or with `sde` its stochastic form.

    With h = λ' − λ, and x̂_0⁻ and h⁻ of the previous step, D = x̂_0 + (x̂_0 − x̂_0⁻)·h/(2·h⁻):
    x' = (σ'/σ)·x + α'·(1 − e^−h)·D, or with `sde`
    x' = (σ'/σ)·e^−h·x + α'·(1 − e^−2h)·D + σ'·√(1 − e^−2h)·noise.
    In the first and the last step D = x̂_0.
    Lu et al. 2022, arXiv 2211.01095: algorithm 2, and SDE-DPM-Solver++(2M).
    """

    sde: bool = False
    remembers = True

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        x, i = state.x, _index(schedule, state, k)
        x0, _ = self.predict(schedule, x, i, out)
        for_x, for_d, for_change, for_noise = (
            sch.extract(factors, i) for factors in self._factors(schedule)
        )
        x = for_x * x + for_d * (x0 + for_change * (x0 - state.x0))
        return State(x + for_noise * noise if self.sde else x, x0)

    def _factors(self, schedule: sch.Schedule) -> tuple[np.ndarray, ...]:
        """The factors of x, D, x̂_0 − x̂_0⁻ and noise at each step, [S] float64 each."""
        alpha, sigma = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
        alpha_next = np.sqrt(schedule.alphas_cumprod_prev)
        sigma_next = np.sqrt(1 - schedule.alphas_cumprod_prev)
        decay = sigma_next * alpha / (sigma * alpha_next)  # e^−h
        for_change = np.zeros(schedule.num_steps)
        h = -np.diff(schedule.half_log_snr)  # h[j]: from step j + 1 to step j
        for_change[1:-1] = h[:-1] / (2 * h[1:])
        for_x, for_noise = sigma_next / sigma, np.zeros(schedule.num_steps)
        if not self.sde:
            return for_x, alpha_next * (1 - decay), for_change, for_noise
        added = 1 - decay**2
        return for_x * decay, alpha_next * added, for_change, sigma_next * np.sqrt(added)


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method for dz/ds = ε, z = x/α, s = σ/α: order 2, two evaluations a step.

    The first evaluation takes an Euler step to z + (s' − s)·ε, the second evaluates ε' there and
    corrects: x' = α'·(z + (s' − s)·(ε + ε')/2). The last step is Euler's: 2·steps − 1 evaluations.
    Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """

    remembers = True

    def indices(self, num_steps: int) -> np.ndarray:
        return num_steps - 1 - (np.arange(2 * num_steps - 1) + 1) // 2

    def start(self, x: jax.Array) -> State:
        zeros = jnp.zeros_like(x)
        return State(x, zeros, (zeros, zeros))

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        del noise
        corrects = k % 2 == 1  # the second evaluations, at the end of a step
        index = jnp.asarray(self.indices(schedule.num_steps))[k]
        x0, eps = self.predict(schedule, state.x, jnp.full(out.shape[:1], index), out)
        begin, eps_begin = (
            jnp.where(corrects, old, new)
            for old, new in zip(state.memory, (state.x, eps), strict=True)
        )
        slope = jnp.where(corrects, (eps_begin + eps) / 2, eps)
        abar, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        s, s_next = np.sqrt(1 / abar - 1), np.sqrt(1 / previous - 1)
        i = jnp.full(out.shape[:1], index + corrects)  # the step that evaluation k belongs to
        x = sch.extract(np.sqrt(previous / abar), i) * begin
        x = x + sch.extract(np.sqrt(previous) * (s_next - s), i) * slope
        return State(x, x0, (begin, eps_begin))


@dataclasses.dataclass(frozen=True)
class FlowEuler(Sampler):
    """Euler's method for dx/dt = v: x' = x + (t' − t)·v, for a network that predicts v.

    The schedule is `flow_schedule`, where x̂_0 = x + (1 − t)·v. Lipman et al. 2023, arXiv
    2210.02747; SiT, Ma et al. 2024, arXiv 2401.08740.
    """

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        del noise
        x0, v = self.velocity(schedule, state.x, k, out)
        return State(state.x + jnp.float32(1 / schedule.num_steps) * v, x0)

    def times(self, schedule: sch.Schedule) -> jax.Array:
        return jnp.asarray(self._grid(schedule), jnp.float32)

    def _grid(self, schedule: sch.Schedule) -> np.ndarray:
        """The times of the evaluations, float64."""
        return schedule.timesteps[self.indices(schedule.num_steps)]

    def velocity(self, schedule: sch.Schedule, x, k, out) -> tuple[jax.Array, jax.Array]:
        """(x̂_0, v) of the network's output [B, H, W, 2C] at evaluation k."""
        left = jnp.asarray(1 - self._grid(schedule), jnp.float32)[k]
        v = jnp.split(out, 2, axis=-1)[0]
        x0 = x + left * v
        if self.limit is None:
            return x0, v
        clipped = jnp.where(jnp.isfinite(x0), jnp.clip(x0, -self.limit, self.limit), x0)
        # At t = 1 x̂_0 is x itself, whatever v is.
        return clipped, jnp.where((clipped == x0) | (left == 0), v, (clipped - x) / left)


@dataclasses.dataclass(frozen=True)
class FlowHeun(FlowEuler):
    """Heun's method for dx/dt = v: order 2, two evaluations a step, the last one at t = 1.

    x' = x + (t' − t)·(v + v')/2, where v' is evaluated at t' after an Euler step. With a limit the
    last step is Euler's: at t = 1 there is no x̂_0 to clip.
    """

    remembers = True

    def indices(self, num_steps: int) -> np.ndarray:
        return np.arange(num_steps)[::-1].repeat(2)

    def _grid(self, schedule: sch.Schedule) -> np.ndarray:
        return (np.arange(2 * schedule.num_steps) + 1) // 2 / schedule.num_steps

    def start(self, x: jax.Array) -> State:
        zeros = jnp.zeros_like(x)
        return State(x, zeros, (zeros, zeros))

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        del noise
        corrects = k % 2 == 1
        x0, v = self.velocity(schedule, state.x, k, out)
        begin, v_begin = (
            jnp.where(corrects, old, new)
            for old, new in zip(state.memory, (state.x, v), strict=True)
        )
        slope = jnp.where(corrects, (v_begin + v) / 2, v)
        if self.limit is not None:
            slope = jnp.where(k == 2 * schedule.num_steps - 1, v_begin, slope)
        x = begin + jnp.float32(1 / schedule.num_steps) * slope
        return State(x, x0, (begin, v_begin))


def _index(schedule: sch.Schedule, state: State, k) -> jax.Array:
    """The schedule's step of evaluation k, [B], for samplers with one evaluation a step."""
    return jnp.full(state.x.shape[:1], schedule.num_steps - 1 - k)


# name → function of η that returns the sampler.
SAMPLERS = {
    "ddpm": lambda eta: DDPM(),
    "ddim": DDIM,
    "dpmpp_2m": lambda eta: DPMSolver(),
    "dpmpp_2m_sde": lambda eta: DPMSolver(sde=True),
    "heun": lambda eta: Heun(),
}
# The same for networks that predict velocity.
FLOW_SAMPLERS = {"euler": lambda eta: FlowEuler(), "heun": lambda eta: FlowHeun()}


def sample(
    network: Callable[..., Any],
    sampler: Sampler,
    schedule: sch.Schedule,
    state: State,
    noise: Callable[[jax.Array], jax.Array],
    start: int | jax.Array = 0,
    count: int | None = None,
) -> State:
    """The state after `count` evaluations of the network (None: all), from number `start` on.

    network: (x [B, H, W, C], t [B] training timesteps) → [B, H, W, 2C]; where the state has a
    cache, (x, t, number of the evaluation, cache) → ([B, H, W, 2C], the new cache).
    noise: number of the evaluation, a scalar from 0 → [B, H, W, C], standard normal.
    start may be traced. After all evaluations `x` is the sample.
    """
    timesteps = sampler.times(schedule)

    def body(j, state):
        k = start + j
        t = jnp.full(state.x.shape[:1], timesteps[k])
        if state.cache is None:
            return sampler.step(schedule, state, network(state.x, t), k, noise(k))
        out, cache = network(state.x, t, k, state.cache)
        return sampler.step(schedule, state, out, k, noise(k))._replace(cache=cache)

    # The trip count is static, so that the host is not asked after each evaluation.
    return jax.lax.fori_loop(0, len(timesteps) if count is None else count, body, state)


def visited(schedule: sch.Schedule, indices: np.ndarray) -> jax.Array:
    """The training timesteps of a schedule's steps `indices`: int32, or float32 if interpolated."""
    whole = np.issubdtype(schedule.timesteps.dtype, np.integer)
    return jnp.asarray(schedule.timesteps[indices], jnp.int32 if whole else jnp.float32)
