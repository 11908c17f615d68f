"""Noise schedules and the Gaussians of the diffusion process.

DDPM: Ho et al. 2020, arXiv 2006.11239. Respacing and learned variance: Nichol & Dhariwal 2021,
arXiv 2102.09672. Constants are computed in float64 and rounded to float32 where they are used.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A diffusion of S steps: ᾱ [S] float64, and each step's training timestep [S].

    Timesteps are integers, or float64 where a spacing interpolates between them.
    """

    alphas_cumprod: np.ndarray
    timesteps: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def half_log_snr(self) -> np.ndarray:
        """λ = ½·log(ᾱ/(1 − ᾱ)), decreasing with the timestep."""
        return np.log(self.alphas_cumprod / (1 - self.alphas_cumprod)) / 2

    @property
    def betas(self) -> np.ndarray:
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t−1} | x_t, x_0): β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t); DDPM, equation 7."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """log of `posterior_variance`; at step 0, where the variance is 0, the value of step 1."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(variance) > 1 else self.betas, variance[1:]))

    @property
    def posterior_mean_x0(self) -> np.ndarray:
        """Factor of x_0 in the mean of q(x_{t−1} | x_t, x_0); DDPM, equation 7."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_xt(self) -> np.ndarray:
        """Factor of x_t in the mean of q(x_{t−1} | x_t, x_0); DDPM, equation 7."""
        alphas = 1 - self.betas
        return (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)


def linear_schedule(steps: int = 1000) -> Schedule:
    """DDPM's β, linear from 1e-4 to 0.02 at 1,000 steps; ADM scales it by 1000/steps at others."""
    scale = 1000 / steps
    betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    return Schedule(np.cumprod(1 - betas), np.arange(steps))


def flow_schedule(steps: int) -> Schedule:
    """`steps` equal steps of flow matching; timesteps are t = 1 − (i + 1)/steps at step i.

    x_t = t·x_0 + (1 − t)·noise: unlike in diffusion, t rises from the noise, 0, to the sample, 1.
    SiT, Ma et al. 2024, arXiv 2401.08740. ᾱ is that of x_t scaled to variance 1.
    """
    t = np.arange(steps)[::-1] / steps
    return Schedule(t**2 / (t**2 + (1 - t) ** 2), t)


def spaced_timesteps(num_steps: int, total: int) -> np.ndarray:
    """`num_steps` timesteps spread evenly over 0…total−1, both ends included; ADM's spacing.

    A single step is timestep 0, as in the published code, and hardly denoises.
    """
    stride = (total - 1) / max(num_steps - 1, 1)
    # Sums of strides, rounded half to even, as in the published code.
    return np.rint(np.cumsum([0.0] + [stride] * (num_steps - 1))).astype(np.int64)


def strided_timesteps(num_steps: int, total: int) -> np.ndarray:
    """`num_steps` timesteps 0, s, 2s, … with an integer stride: "ddimN" in the published code.

    Raises ValueError if no stride gives exactly `num_steps`.
    """
    for stride in range(1, total + 1):
        if len(range(0, total, stride)) == num_steps:
            return np.arange(0, total, stride)
    raise ValueError(f"no integer stride gives exactly {num_steps} of {total} timesteps")


def log_snr_timesteps(num_steps: int, schedule: Schedule) -> np.ndarray:
    """Timesteps evenly spaced in λ (Lu et al. 2022, arXiv 2206.00927).

    float64, ascending, both ends included; a single step is the noisiest one.
    """
    first, last = schedule.half_log_snr[[0, -1]]
    return _timesteps_at(np.linspace(last, first, num_steps), schedule)


def karras_timesteps(num_steps: int, schedule: Schedule, rho: float = 7.0) -> np.ndarray:
    """Timesteps evenly spaced in σ^(1/ρ), σ = e^−λ (Karras et al. 2022, arXiv 2206.00364, eq. 5).

    float64, ascending, both ends included; a single step is the noisiest one.
    """
    smallest, largest = np.exp(-schedule.half_log_snr[[0, -1]]) ** (1 / rho)
    return _timesteps_at(-rho * np.log(np.linspace(largest, smallest, num_steps)), schedule)


def _timesteps_at(half_log_snr: np.ndarray, schedule: Schedule) -> np.ndarray:
    """The timesteps, ascending, of increasing λ, interpolated linearly between steps."""
    t = np.interp(half_log_snr, schedule.half_log_snr[::-1], schedule.timesteps[::-1])
    return t[::-1].copy()


# name → function of (num_steps, schedule) that returns the timesteps, ascending.
SPACINGS = {
    "even": lambda num_steps, schedule: spaced_timesteps(num_steps, schedule.num_steps),
    "stride": lambda num_steps, schedule: strided_timesteps(num_steps, schedule.num_steps),
    "karras": karras_timesteps,
    "log_snr": log_snr_timesteps,
}


def respace(schedule: Schedule, timesteps: np.ndarray) -> Schedule:
    """The schedule that visits only `timesteps` (ascending) of `schedule`.

    Nichol & Dhariwal 2021, section 4. Between integer timesteps λ is interpolated linearly.
    """
    if np.issubdtype(timesteps.dtype, np.integer):
        return Schedule(schedule.alphas_cumprod[timesteps], schedule.timesteps[timesteps])
    half_log_snr = np.interp(timesteps, schedule.timesteps, schedule.half_log_snr)
    return Schedule(1 / (1 + np.exp(-2 * half_log_snr)), timesteps)


def extract(constants: np.ndarray, t: jax.Array) -> jax.Array:
    """The constants [S] float64 at step indices t [B]: [B, 1, 1, 1] float32."""
    return jnp.asarray(constants, jnp.float32)[t][:, None, None, None]


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """A sample of q(x_t | x_0): √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise; DDPM, equation 4.

    x0, noise: [B, H, W, C]; t: [B]. Returns [B, H, W, C].
    """
    signal = extract(np.sqrt(schedule.alphas_cumprod), t)
    return signal * x0 + extract(np.sqrt(1 - schedule.alphas_cumprod), t) * noise


def predict_x0(schedule: Schedule, x: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """x̂_0 = x_t/√ᾱ_t − √(1/ᾱ_t − 1) · ε, not clipped; DDPM, equation 15."""
    inverse = 1 / schedule.alphas_cumprod
    return extract(np.sqrt(inverse), t) * x - extract(np.sqrt(inverse - 1), t) * eps


def v_target(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0; Salimans & Ho 2022, arXiv 2202.00512, appendix D."""
    signal = extract(np.sqrt(schedule.alphas_cumprod), t)
    return signal * noise - extract(np.sqrt(1 - schedule.alphas_cumprod), t) * x0


def predict_x0_from_v(schedule: Schedule, x: jax.Array, t: jax.Array, v: jax.Array) -> jax.Array:
    """x̂_0 = √ᾱ_t · x_t − √(1 − ᾱ_t) · v, not clipped."""
    signal = extract(np.sqrt(schedule.alphas_cumprod), t)
    return signal * x - extract(np.sqrt(1 - schedule.alphas_cumprod), t) * v


def predict_eps_from_v(schedule: Schedule, x: jax.Array, t: jax.Array, v: jax.Array) -> jax.Array:
    """ε = √(1 − ᾱ_t) · x_t + √ᾱ_t · v."""
    noise = extract(np.sqrt(1 - schedule.alphas_cumprod), t)
    return noise * x + extract(np.sqrt(schedule.alphas_cumprod), t) * v


def predict_eps(schedule: Schedule, x: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:
    """ε = (x_t − √ᾱ_t · x_0)/√(1 − ᾱ_t), the noise of x_t given x_0."""
    abar = schedule.alphas_cumprod
    return (x - extract(np.sqrt(abar), t) * x0) / extract(np.sqrt(1 - abar), t)


def posterior_mean(schedule: Schedule, x0: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of q(x_{t−1} | x_t, x_0); DDPM, equation 7."""
    return extract(schedule.posterior_mean_x0, t) * x0 + extract(schedule.posterior_mean_xt, t) * x


def learned_log_variance(schedule: Schedule, v: jax.Array, t: jax.Array) -> jax.Array:
    """log σ², interpolated between the posterior's (v = −1) and that of β_t (v = 1).

    Nichol & Dhariwal 2021, equation 15, with v in [−1, 1] as in the published code.
    """
    low = extract(schedule.posterior_log_variance, t)
    high = extract(np.log(schedule.betas), t)
    fraction = (v + 1) / 2
    return fraction * high + (1 - fraction) * low
