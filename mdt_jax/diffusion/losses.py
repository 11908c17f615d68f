"""The training loss: mean squared error of what the network predicts, and in diffusion the
variational term of the learned variance.

Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1; Salimans &
Ho 2022, arXiv 2202.00512 (v); Lipman et al. 2023, arXiv 2210.02747 (flow).
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


GAMMA = 5.0  # of min_snr_5


def uniform_weights(schedule: sch.Schedule) -> np.ndarray:
    """1 at every step, [S] float64: DDPM's simple loss."""
    return np.ones(schedule.num_steps)


def min_snr_weights(schedule: sch.Schedule, gamma: float = GAMMA) -> np.ndarray:
    """Min-SNR-γ weights of the squared error of ε, [S] float64: min(SNR, γ)/SNR, SNR = ᾱ/(1 − ᾱ).

    Hang et al. 2023, arXiv 2303.09556.
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    return np.minimum(snr, gamma) / snr


LOSS_WEIGHTS = {"uniform": uniform_weights, "min_snr_5": min_snr_weights}


def weights_of_samples(
    name: str, objective: str, schedule: sch.Schedule, t: jax.Array
) -> jax.Array:
    """The weights of the squared errors of what the network predicts, at t [B]: [B] float32.

    objective: what it predicts. t: steps of the schedule, or of flow times from 0 to 1.
    Min-SNR-γ weighs the squared error of x̂_0 by min(SNR, γ). In v, whose error is that of x̂_0 over
    σ, this is min(SNR, γ)/(SNR + 1); in flow, over 1 − t, it is min(t², γ·(1 − t)²).
    """
    if objective == "flow":
        if name == "uniform":
            return jnp.ones(t.shape, jnp.float32)
        return jnp.minimum(jnp.square(t), GAMMA * jnp.square(1 - t))
    weights = LOSS_WEIGHTS[name](schedule)
    if objective == "v" and name == "min_snr_5":
        weights = weights * schedule.alphas_cumprod  # SNR/(SNR + 1) = ᾱ
    return sch.extract(weights, t).reshape(-1)


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
    objective: str = "epsilon",
) -> dict[str, jax.Array]:
    """Per-sample losses of one pass, not weighted: {"mse": [B], "vb": [B]} float32.

    network: (x [B, H, W, C], t [B]) → [B, H, W, 2C]. x0, noise: [B, H, W, C] float32; t: [B].
    mask: [B, H, W, 1] bool, the pixels that count; None: all. objective: what the network predicts,
    "epsilon" or "v".
    The variational term trains the variance only: no gradient flows through the predicted mean.
    """
    x = sch.q_sample(schedule, x0, t, noise)
    predicted, variance = jnp.split(network(x, t), 2, axis=-1)
    target = noise if objective == "epsilon" else sch.v_target(schedule, x0, t, noise)
    detached = jax.lax.stop_gradient(predicted)
    predict_x0 = sch.predict_x0 if objective == "epsilon" else sch.predict_x0_from_v
    mean = sch.posterior_mean(schedule, predict_x0(schedule, x, t, detached), x, t)
    log_variance = sch.learned_log_variance(schedule, variance, t)
    return {
        "mse": mean_per_sample(jnp.square(target - predicted), mask),
        "vb": variational_bound(schedule, x0, x, t, mean, log_variance, mask),
    }


def flow_losses(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    x0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    mask: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Per-sample losses of one pass of flow matching, not weighted: {"mse": [B]} float32.

    The network predicts the velocity x_0 − ε of x_t = t·x_0 + (1 − t)·ε; the second half of its
    channels is not used. t: [B] float32 from 0 (noise) to 1. Otherwise as `diffusion_losses`.
    """
    times = t[:, None, None, None]
    velocity = jnp.split(network(times * x0 + (1 - times) * noise, t), 2, axis=-1)[0]
    return {"mse": mean_per_sample(jnp.square(x0 - noise - velocity), mask)}
