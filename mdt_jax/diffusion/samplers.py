"""Samplers: how one evaluation of the network changes x, and the loop over them.

α = √ᾱ and σ = √(1 − ᾱ) at a step of the schedule, λ = log(α/σ); a dash marks the next step, less
noisy, which after the last one is the clean end (α' = 1, σ' = 0).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import schedule as sch


class State(NamedTuple):
    """x: [B, H, W, C] float32, what the network sees next; x0: its last prediction of the clean
    sample; memory: what else the sampler needs."""

    x: jax.Array
    x0: jax.Array
    memory: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One evaluation of the network for each step of the schedule, nothing remembered.

    limit: each x̂_0 is clipped to ±limit, and ε is what that leaves. None: nothing is clipped.
    """

    limit: float | None = dataclasses.field(default=None, kw_only=True)
    remembers = False  # whether a step depends on those before

    def indices(self, num_steps: int) -> np.ndarray:
        """The step of the schedule at which each evaluation is made; the noisiest first."""
        return np.arange(num_steps)[::-1]

    def start(self, x: jax.Array) -> State:
        """The state of x: [B, H, W, C] float32 noise."""
        return State(x, jnp.zeros_like(x))

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        """The state after evaluation number k (scalar, from 0), which gave `out` [B, H, W, 2C].

        noise: [B, H, W, C] standard normal.
        """
        raise NotImplementedError

    def predict(self, schedule: sch.Schedule, x, i, out) -> tuple[jax.Array, jax.Array]:
        """(x̂_0, ε) of the network's output [B, H, W, 2C] at steps i [B]."""
        eps = jnp.split(out, 2, axis=-1)[0]
        x0 = sch.predict_x0(schedule, x, i, eps)
        if self.limit is None:
            return x0, eps
        # An infinity stays one, so that it is noticed at the end.
        clipped = jnp.where(jnp.isfinite(x0), jnp.clip(x0, -self.limit, self.limit), x0)
        # Where nothing was clipped ε is not computed anew, which would round it.
        return clipped, jnp.where(clipped == x0, eps, sch.predict_eps(schedule, x, i, clipped))


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling with the learned variance: x' = μ(x, x̂_0) + 1[not last]·σ_learned·noise.

    Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672.
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

    D = x̂_0 + (x̂_0 − x̂_0 of the step before)·h/(2·h of the step before), h = λ' − λ;
    x' = (σ'/σ)·x + α'·(1 − e^−h)·D, or
    x' = (σ'/σ)·e^−h·x + α'·(1 − e^−2h)·D + σ'·√(1 − e^−2h)·noise.
    The first and the last step, to the clean end, have D = x̂_0.
    Lu et al. 2022, arXiv 2211.01095: algorithm 2, and SDE-DPM-Solver++(2M).
    """

    sde: bool = False
    remembers = True

    def step(self, schedule: sch.Schedule, state: State, out, k, noise) -> State:
        x, i = state.x, _index(schedule, state, k)
        x0, _ = self.predict(schedule, x, i, out)
        keep, take, back, add = (sch.extract(table, i) for table in self._tables(schedule))
        x = keep * x + take * (x0 + back * (x0 - state.x0))
        return State(x + add * noise if self.sde else x, x0)

    def _tables(self, schedule: sch.Schedule) -> tuple[np.ndarray, ...]:
        """Factors of x, of D, of the change of x̂_0 in D, and of the noise, by step; float64."""
        alpha, sigma = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
        alpha_next = np.sqrt(schedule.alphas_cumprod_prev)
        sigma_next = np.sqrt(1 - schedule.alphas_cumprod_prev)
        decay = sigma_next * alpha / (sigma * alpha_next)  # e^−h
        back = np.zeros(schedule.num_steps)
        h = -np.diff(schedule.half_log_snr)  # h[j]: from step j + 1 to step j
        back[1:-1] = h[:-1] / (2 * h[1:])
        if self.sde:
            share = 1 - decay**2
            return sigma_next / sigma * decay, alpha_next * share, back, sigma_next * np.sqrt(share)
        return sigma_next / sigma, alpha_next * (1 - decay), back, np.zeros(schedule.num_steps)


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method for dz/ds = ε, z = x/α, s = σ/α: two evaluations a step, order 2.

    To z + (s' − s)·ε; there ε' is evaluated; then x' = α'·(z + (s' − s)·(ε + ε')/2). The last step,
    to the clean end, is Euler's and takes one: 2·steps − 1 in all.
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
        corrects = k % 2 == 1  # the evaluations in between, at the end of the step
        at = jnp.asarray(self.indices(schedule.num_steps))[k]
        x0, eps = self.predict(schedule, state.x, jnp.full(out.shape[:1], at), out)
        begin, eps_begin = (
            jnp.where(corrects, old, new)
            for old, new in zip(state.memory, (state.x, eps), strict=True)
        )
        slope = jnp.where(corrects, (eps_begin + eps) / 2, eps)
        abar, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        s, s_next = np.sqrt(1 / abar - 1), np.sqrt(1 / previous - 1)
        i = jnp.full(out.shape[:1], at + corrects)  # the step that began there
        x = sch.extract(np.sqrt(previous / abar), i) * begin
        x = x + sch.extract(np.sqrt(previous) * (s_next - s), i) * slope
        return State(x, x0, (begin, eps_begin))


def _index(schedule: sch.Schedule, state: State, k) -> jax.Array:
    """[B], the step of the schedule at evaluation k, where each step has one."""
    return jnp.full(state.x.shape[:1], schedule.num_steps - 1 - k)


# name → what makes the sampler of an η.
SAMPLERS = {
    "ddpm": lambda eta: DDPM(),
    "ddim": DDIM,
    "dpmpp_2m": lambda eta: DPMSolver(),
    "dpmpp_2m_sde": lambda eta: DPMSolver(sde=True),
    "heun": lambda eta: Heun(),
}


def sample(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    sampler: Sampler,
    schedule: sch.Schedule,
    state: State,
    noise: Callable[[jax.Array], jax.Array],
    start: int | jax.Array = 0,
    count: int | None = None,
) -> State:
    """Make evaluations of the network from `state` on in one loop; all of them by default.

    network: (x [B, H, W, C], t [B] training timesteps) → [B, H, W, 2C].
    noise: number of the evaluation from 0, a scalar → [B, H, W, C] standard normal draws.
    start: number of the first evaluation, may be traced; count: how many. After all of them `x` is
    the sample.
    """
    indices = sampler.indices(schedule.num_steps)
    timesteps = visited(schedule, indices)

    def body(j, state):
        k = start + j
        t = jnp.full(state.x.shape[:1], timesteps[k])
        return sampler.step(schedule, state, network(state.x, t), k, noise(k))

    # The number of turns is static, so that no host has to be asked after each.
    return jax.lax.fori_loop(0, len(indices) if count is None else count, body, state)


def visited(schedule: sch.Schedule, indices: np.ndarray) -> jax.Array:
    """The training timesteps of steps of a schedule: int32, or float32 where they lie between."""
    whole = np.issubdtype(schedule.timesteps.dtype, np.integer)
    return jnp.asarray(schedule.timesteps[indices], jnp.int32 if whole else jnp.float32)
