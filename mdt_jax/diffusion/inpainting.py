"""Inpainting with a trained denoiser: the known part is put back before each evaluation.

RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1): the known part of x_t is drawn from
q(x_t | x_0), the hidden part is the sampler's. Jumps back to more noise let the two parts agree.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.guidance import Network
from mdt_jax.diffusion.samplers import Sampler, visited


class Known(NamedTuple):
    """images: [B, H, W, C] float32, clean; hidden: [1 or B, H, W, 1] bool, what is not known."""

    images: jax.Array
    hidden: jax.Array


def resampling_walk(num_steps: int, jump_length: int, num_resamples: int) -> np.ndarray:
    """The steps at which RePaint evaluates the network, in order, then −1, the clean end.

    At each multiple of `jump_length` the walk jumps back up by that many steps, until it has passed
    each of these intervals `num_resamples` times (1: no jumps).
    """
    jumps = {step: num_resamples - 1 for step in range(0, num_steps - jump_length, jump_length)}
    walk, step = [], num_steps - 1
    while step >= 0:
        walk.append(step)
        step -= 1
        if jumps.get(step, 0) > 0:
            jumps[step] -= 1
            step += jump_length
    return np.array([*walk, -1])


@dataclasses.dataclass(frozen=True)
class RePaint:
    """A sampler on a walk through the steps of a schedule, with the known part put back.

    sampler: without a memory of earlier steps. walk: as `resampling_walk` returns it.
    """

    sampler: Sampler
    schedule: sch.Schedule
    walk: np.ndarray

    def sample(
        self,
        network: Network,
        x: jax.Array,
        known: Known,
        noise: Callable[[jax.Array], jax.Array],
        start: int | jax.Array,
        count: int,
    ) -> jax.Array:
        """Make `count` evaluations of the walk in one loop, from number `start` on (may be traced).

        network: as in `samplers.sample`. x: [B, H, W, C], the noisy sample. noise: number of a
        draw, a scalar → [B, H, W, C] standard normal; each evaluation takes three draws.
        """
        steps, timesteps = jnp.asarray(self.walk), visited(self.schedule, self.walk[:-1])
        # ᾱ of step i is at [i + 1], that of the clean end at [0].
        abar = np.append(1.0, self.schedule.alphas_cumprod)

        def body(j, x):
            k = start + j
            i, after = (jnp.full(x.shape[:1], step) for step in (steps[k], steps[k + 1]))
            noised = sch.q_sample(self.schedule, known.images, i, noise(3 * k))
            x = jnp.where(known.hidden, x, noised)
            out = network(x, jnp.full(x.shape[:1], timesteps[k]))
            evaluation, state = self.schedule.num_steps - 1 - steps[k], self.sampler.start(x)
            x = self.sampler.step(self.schedule, state, out, evaluation, noise(3 * k + 1)).x
            # From step i − 1 back up to the walk's next step: q(x_t | x_s), t ≥ s.
            ratio = sch.extract(abar, after + 1) / sch.extract(abar, i)
            return jnp.sqrt(ratio) * x + jnp.sqrt(jnp.maximum(1 - ratio, 0)) * noise(3 * k + 2)

        return jax.lax.fori_loop(0, count, body, x)
