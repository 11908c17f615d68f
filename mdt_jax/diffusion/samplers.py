"""Samplers: how one step goes from x_t to x_{t−1}, and the loop over them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import schedule as sch


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Ancestral sampling with the learned variance: x_{t−1} = μ(x_t, x̂_0) + 1[t>0]·σ_t·noise."""

    def step(self, schedule: sch.Schedule, x, out, i, noise):
        """x, noise: [B, H, W, C]; out: [B, H, W, 2C] of the network at x; i: [B] step indices."""
        eps, v = jnp.split(out, 2, axis=-1)
        mean = sch.posterior_mean(schedule, sch.predict_x0(schedule, x, i, eps), x, i)
        std = jnp.exp(0.5 * sch.learned_log_variance(schedule, v, i))
        return mean + jnp.where(i > 0, 1.0, 0.0)[:, None, None, None] * std * noise


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Deterministic sampling (Song et al. 2021, η = 0): x_{t−1} = √ᾱ_{t−1}·x̂_0 + √(1−ᾱ_{t−1})·ε."""

    def step(self, schedule: sch.Schedule, x, out, i, noise):
        """As in DDPM; the noise is not used."""
        del noise
        eps = jnp.split(out, 2, axis=-1)[0]
        x0 = sch.predict_x0(schedule, x, i, eps)
        previous = schedule.alphas_cumprod_prev
        return sch.extract(np.sqrt(previous), i) * x0 + sch.extract(np.sqrt(1 - previous), i) * eps


SAMPLERS = {"ddpm": DDPM(), "ddim": DDIM()}


def sample(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    sampler: DDPM | DDIM,
    schedule: sch.Schedule,
    x: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    start: int | jax.Array = 0,
    stop: int | jax.Array | None = None,
) -> jax.Array:
    """Run steps of `schedule` from x, the noisiest first, in one loop; all of them by default.

    network: (x [B, H, W, C], t [B] training timesteps) → [B, H, W, 2C]. x: [B, H, W, C] float32.
    noise: number of the step from 0, a scalar → [B, H, W, C] standard normal draws.
    start, stop: numbers of the first step to run and of the first one not to; may be traced, so
    that one program runs any part of the way.
    """
    timesteps = jnp.asarray(schedule.timesteps, jnp.int32)

    def body(k, x):
        i = jnp.full(x.shape[:1], schedule.num_steps - 1 - k)
        return sampler.step(schedule, x, network(x, timesteps[i]), i, noise(k))

    return jax.lax.fori_loop(start, schedule.num_steps if stop is None else stop, body, x)
