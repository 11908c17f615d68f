"""The training loss: mean squared error of ε plus the variational term of the learned variance.

Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import schedule as sch


def mean_per_sample(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean of each sample of x [B, …]: [B]; with a mask, over the elements where it is true."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, x.shape).reshape(x.shape[0], -1)
    return x.reshape(x.shape[0], -1).mean(-1, where=mask)


def uniform_weights(schedule: sch.Schedule) -> np.ndarray:
    """1 at every step, [S] float64: DDPM's simple loss."""
    return np.ones(schedule.num_steps)


def min_snr_weights(schedule: sch.Schedule, gamma: float = 5.0) -> np.ndarray:
    """Min-SNR-γ weights of the squared error of ε, [S] float64: min(SNR, γ)/SNR, SNR = ᾱ/(1 − ᾱ).

    Hang et al. 2023, arXiv 2303.09556.
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    return np.minimum(snr, gamma) / snr


LOSS_WEIGHTS = {"uniform": uniform_weights, "min_snr_5": min_snr_weights}


def normal_kl(mean1, log_var1, mean2, log_var2) -> jax.Array:
    """KL(N(mean1, exp log_var1) ‖ N(mean2, exp log_var2)) in nats, elementwise."""
    return 0.5 * (
        log_var2
        - log_var1
        - 1.0
        + jnp.exp(log_var1 - log_var2)
        + jnp.square(mean1 - mean2) * jnp.exp(-log_var2)
    )


def discretized_gaussian_log_likelihood(x, mean, log_scale) -> jax.Array:
    """log of a Gaussian's mass in the bin of width 2/255 around each x in [−1, 1], in nats.

    DDPM, equation 13: the outermost bins extend to infinity. The normal CDF is approximated by a
    tanh, as in ADM.
    """

    def cdf(z):
        return 0.5 * (1.0 + jnp.tanh(jnp.sqrt(2.0 / jnp.pi) * (z + 0.044715 * z**3)))

    centred = x - mean
    inverse_std = jnp.exp(-log_scale)
    upper = cdf(inverse_std * (centred + 1.0 / 255.0))
    lower = cdf(inverse_std * (centred - 1.0 / 255.0))

    def log(p):
        return jnp.log(jnp.maximum(p, 1e-12))

    return jnp.where(
        x < -0.999, log(upper), jnp.where(x > 0.999, log(1.0 - lower), log(upper - lower))
    )


def variational_bound(schedule: sch.Schedule, x0, x, t, mean, log_variance, mask=None) -> jax.Array:
    """The variational bound's term at step t, [B], in bits per dimension (DDPM, equation 5).

    The KL divergence from the true posterior; at t = 0 the negative log-likelihood of x0.
    """
    true_mean = sch.posterior_mean(schedule, x0, x, t)
    true_log_variance = sch.extract(schedule.posterior_log_variance, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
    return mean_per_sample(jnp.where(t[:, None, None, None] == 0, nll, kl), mask) / math.log(2)


def diffusion_losses(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: sch.Schedule,
    x0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    mask: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Per-sample losses of one pass, not weighted: {"mse": [B], "vb": [B]} float32.

    network: (x [B, H, W, C], t [B]) → [B, H, W, 2C]. x0, noise: [B, H, W, C] float32; t: [B].
    mask: [B, H, W, 1] bool, the pixels that count; None: all.
    The variational term trains the variance only: no gradient flows through the predicted mean.
    """
    x = sch.q_sample(schedule, x0, t, noise)
    eps, v = jnp.split(network(x, t), 2, axis=-1)
    detached = jax.lax.stop_gradient(eps)
    mean = sch.posterior_mean(schedule, sch.predict_x0(schedule, x, t, detached), x, t)
    log_variance = sch.learned_log_variance(schedule, v, t)
    return {
        "mse": mean_per_sample(jnp.square(noise - eps), mask),
        "vb": variational_bound(schedule, x0, x, t, mean, log_variance, mask),
    }
