"""Inpainting with a trained denoiser: what is known is put back before each evaluation.

RePaint (Lugmayr et al. 2022, arXiv 2201.09865): the known part of x is drawn from q(x_t | x_0), the
rest is the sampler's; jumping back to more noise and denoising again lets the two parts agree.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.samplers import Sampler, visited


def resampling_walk(num_steps: int, jump_length: int, num_resamples: int) -> np.ndarray:
    """The steps at which RePaint evaluates the network, in order, then −1: the clean end.

    Whenever a multiple of `jump_length` is reached from above it goes back up by that many steps,
    until each has been passed `num_resamples` times (once: no jumps).
    """
    left = {step: num_resamples - 1 for step in range(0, num_steps - jump_length, jump_length)}
    walk, step = [], num_steps - 1
    while step >= 0:
        walk.append(step)
        step -= 1
        if left.get(step, 0) > 0:
            left[step] -= 1
            step += jump_length
    return np.array([*walk, -1])


def inpaint_steps(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    sampler: Sampler,
    schedule: sch.Schedule,
    walk: np.ndarray,
    x: jax.Array,
    known: jax.Array,
    hidden: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    start: int | jax.Array,
    count: int,
) -> jax.Array:
    """`count` evaluations of a walk, from number `start` on (may be traced), in one loop.

    network: as in `samplers.sample`. sampler: one that remembers nothing. walk: as
    `resampling_walk` gives it. x: [B, H, W, C], the noisy sample; known: the same, clean; hidden:
    [B, H, W, 1] bool. noise: number of a draw, a scalar → [B, H, W, C]; an evaluation takes three.
    """
    steps, timesteps = jnp.asarray(walk), visited(schedule, walk[:-1])
    # ᾱ of step i is at [i + 1], that of the clean end at [0].
    abar = np.append(1.0, schedule.alphas_cumprod)

    def body(j, x):
        k = start + j
        i, after = (jnp.full(x.shape[:1], step) for step in (steps[k], steps[k + 1]))
        x = jnp.where(hidden, x, sch.q_sample(schedule, known, i, noise(3 * k)))
        out = network(x, jnp.full(x.shape[:1], timesteps[k]))
        evaluation = schedule.num_steps - 1 - steps[k]
        x = sampler.step(schedule, sampler.start(x), out, evaluation, noise(3 * k + 1)).x
        # From step i − 1 back up to where the walk goes on: q(x_t | x_s), t ≥ s.
        left = sch.extract(abar, after + 1) / sch.extract(abar, i)
        return jnp.sqrt(left) * x + jnp.sqrt(jnp.maximum(1 - left, 0)) * noise(3 * k + 2)

    return jax.lax.fori_loop(0, count, body, x)
