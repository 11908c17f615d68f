"""Noise schedules of DDPM (Ho et al. 2020) and their respacing (Nichol & Dhariwal 2021).

Constants are computed in float64 NumPy and rounded to float32 once, where they are used.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A diffusion of S steps: ᾱ [S] float64, and the training timestep [S] each step stands for.

    Timesteps are whole numbers, or float64 where a spacing lies between them.
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
        """λ = ½·log(ᾱ/(1 − ᾱ)), falling with the timestep."""
        return np.log(self.alphas_cumprod / (1 - self.alphas_cumprod)) / 2

    @property
    def betas(self) -> np.ndarray:
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t−1} | x_t, x_0): β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm; step 0, where the variance is 0, takes the value of step 1."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(variance) > 1 else self.betas, variance[1:]))

    @property
    def posterior_mean_x0(self) -> np.ndarray:
        """Factor of x_0 in the mean of q(x_{t−1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_xt(self) -> np.ndarray:
        """Factor of x_t in the mean of q(x_{t−1} | x_t, x_0)."""
        alphas = 1 - self.betas
        return (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)


def linear_schedule(steps: int = 1000) -> Schedule:
    """β linear from 1e-4 to 0.02 at 1,000 steps, scaled by 1000/steps at other lengths."""
    scale = 1000 / steps
    betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    return Schedule(np.cumprod(1 - betas), np.arange(steps))


def spaced_timesteps(num_steps: int, total: int) -> np.ndarray:
    """`num_steps` timesteps spread evenly over 0…total−1, both ends included; one step is 0.

    That one step leaves noise nearly as it is; so it is in the published code.
    """
    if num_steps == 1:
        return np.array([0])
    stride = (total - 1) / (num_steps - 1)
    # Built up by addition and rounded half to even, as the published code does.
    position, chosen = 0.0, []
    for _ in range(num_steps):
        chosen.append(round(position))
        position += stride
    return np.array(chosen)


def strided_timesteps(num_steps: int, total: int) -> np.ndarray:
    """`num_steps` timesteps 0, s, 2s, … with an integer stride: "ddimN" of the published code.

    Raises ValueError when no stride gives exactly `num_steps`.
    """
    for stride in range(1, total + 1):
        if len(range(0, total, stride)) == num_steps:
            return np.arange(0, total, stride)
    raise ValueError(f"no integer stride takes exactly {num_steps} of {total} timesteps")


def log_snr_timesteps(num_steps: int, schedule: Schedule) -> np.ndarray:
    """Evenly spaced in λ from the first to the last step: Lu et al. 2022, arXiv 2206.00927.

    float64, ascending, both ends included; the noisiest alone for one step.
    """
    first, last = schedule.half_log_snr[[0, -1]]
    return _timesteps_at(np.linspace(last, first, num_steps), schedule)


def karras_timesteps(num_steps: int, schedule: Schedule, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced in σ^(1/ρ), σ = e^−λ: Karras et al. 2022, arXiv 2206.00364, equation 5.

    float64, ascending, both ends included; the noisiest alone for one step.
    """
    smallest, largest = np.exp(-schedule.half_log_snr[[0, -1]]) ** (1 / rho)
    return _timesteps_at(-rho * np.log(np.linspace(largest, smallest, num_steps)), schedule)


def _timesteps_at(half_log_snr: np.ndarray, schedule: Schedule) -> np.ndarray:
    """Where a rising row of λ lies among the timesteps, linearly between them; ascending."""
    t = np.interp(half_log_snr, schedule.half_log_snr[::-1], schedule.timesteps[::-1])
    return t[::-1].copy()


# name → function of (num_steps, schedule) that gives the timesteps, ascending.
SPACINGS = {
    "even": lambda num_steps, schedule: spaced_timesteps(num_steps, schedule.num_steps),
    "stride": lambda num_steps, schedule: strided_timesteps(num_steps, schedule.num_steps),
    "karras": karras_timesteps,
    "log_snr": log_snr_timesteps,
}


def respace(schedule: Schedule, timesteps: np.ndarray) -> Schedule:
    """The schedule that visits only `timesteps` (ascending) of `schedule`.

    Between whole timesteps λ is interpolated linearly.
    """
    if np.issubdtype(timesteps.dtype, np.integer):
        return Schedule(schedule.alphas_cumprod[timesteps], schedule.timesteps[timesteps])
    half_log_snr = np.interp(timesteps, schedule.timesteps, schedule.half_log_snr)
    return Schedule(1 / (1 + np.exp(-2 * half_log_snr)), timesteps)


def extract(constants: np.ndarray, t: jax.Array) -> jax.Array:
    """constants: [S] float64, t: [B] step indices → [B, 1, 1, 1] float32."""
    return jnp.asarray(constants, jnp.float32)[t][:, None, None, None]


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t ~ q(x_t | x_0) = √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise; x0, noise: [B, H, W, C], t: [B]."""
    signal = extract(np.sqrt(schedule.alphas_cumprod), t)
    return signal * x0 + extract(np.sqrt(1 - schedule.alphas_cumprod), t) * noise


def predict_x0(schedule: Schedule, x: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """x_0 = x_t/√ᾱ_t − √(1/ᾱ_t − 1) · ε, not clipped."""
    inverse = 1 / schedule.alphas_cumprod
    return extract(np.sqrt(inverse), t) * x - extract(np.sqrt(inverse - 1), t) * eps


def predict_eps(schedule: Schedule, x: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:
    """ε = (x_t − √ᾱ_t · x_0)/√(1 − ᾱ_t), the noise that a clean sample leaves."""
    abar = schedule.alphas_cumprod
    return (x - extract(np.sqrt(abar), t) * x0) / extract(np.sqrt(1 - abar), t)


def posterior_mean(schedule: Schedule, x0: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of q(x_{t−1} | x_t, x_0)."""
    return extract(schedule.posterior_mean_x0, t) * x0 + extract(schedule.posterior_mean_xt, t) * x


def learned_log_variance(schedule: Schedule, v: jax.Array, t: jax.Array) -> jax.Array:
    """log σ² between the posterior's (v = −1) and β_t (v = 1): Nichol & Dhariwal 2021, eq. 15."""
    low = extract(schedule.posterior_log_variance, t)
    high = extract(np.log(schedule.betas), t)
    fraction = (v + 1) / 2
    return fraction * high + (1 - fraction) * low
