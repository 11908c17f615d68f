"""How samples are drawn: the options, their checks, and labels."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.guidance import WEIGHTS, limit_to_interval, snap_to_one
from mdt_jax.diffusion.samplers import SAMPLERS, Sampler, visited
from mdt_jax.runtime import limits
from mdt_jax.runtime.backend import HIGHEST, PRECISIONS
from mdt_jax.runtime.errors import NotFiniteError, UserError

# What a model without classes takes.
UNGUIDED: dict[str, Any] = {"guidance_scale": 1.0, "guidance": "power_cosine"}
# What a config says of clip_denoised.
CLIPPING = {"auto": None, "true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How samples are drawn; the defaults are the published ones.

    num_steps: steps of the schedule, each one evaluation of the network (heun: two, the last one).
    eta: DDIM's, in [0, 1]. guidance_low, guidance_high: shares of the diffusion's steps between
    which guidance acts; beyond them the conditional prediction is taken. guidance_skip_tolerance:
    it is also taken, at half the cost, where the weight differs from 1 by less than this.
    clip_denoised: the predicted clean sample is clipped to [-1, 1] at each step; None: as
    `clipping_for` says.
    precision: of float32 matmuls on accelerators, those of a VAE too: highest, high or default.
    """

    sampler: str = "ddpm"
    num_steps: int = 250
    spacing: str = "even"
    eta: float = 0.0
    guidance_scale: float = 3.8
    guidance_power: float = 4.0
    guidance: str = "power_cosine"
    guidance_channels: int = 3
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_skip_tolerance: float = 0.0
    clip_denoised: bool | None = None
    diffusion_steps: int = 1000
    precision: str = HIGHEST

    @classmethod
    def from_config(cls, config) -> "SampleOptions":
        """From a config's `sample` and `diffusion` fields, and its precision."""
        others = {"diffusion_steps": config.diffusion.steps, "precision": config.train.precision}
        names = {field.name for field in dataclasses.fields(cls)} - set(others)
        options = cls(**{name: config.sample[name] for name in names}, **others)
        options = dataclasses.replace(options, clip_denoised=CLIPPING[config.sample.clip_denoised])
        return options.clipping_for(config.vae.path == "identity")

    def clipping_for(self, pixels: bool) -> "SampleOptions":
        """With `clip_denoised` decided where it is None: on for pixels, off for latents."""
        if self.clip_denoised is not None:
            return self
        return dataclasses.replace(self, clip_denoised=pixels)

    def check(self, num_classes: int) -> None:
        """Raise UserError, naming the option, for what cannot be sampled."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            wanted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
            if not isinstance(value, wanted):
                raise UserError(f"{field.name} is {value!r}; it must be of type {_name_of(kind)}")
            if isinstance(value, numbers.Real):
                limits.check_number(field.name, value)
        known = {
            "sampler": SAMPLERS, "spacing": sch.SPACINGS, "guidance": WEIGHTS,
            "precision": PRECISIONS,
        }  # fmt: skip
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        if not 1 <= self.num_steps <= self.diffusion_steps:
            raise UserError(
                f"num_steps is {self.num_steps}; it must be between 1 and the "
                f"{self.diffusion_steps} steps of the training schedule"
            )
        try:
            self.schedule()
        except ValueError as error:
            raise UserError(
                f"num_steps {self.num_steps} with spacing {self.spacing}: {error}"
            ) from None
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}; it must be in [0, 1]")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta is {self.eta}, which is ddim's; the sampler is {self.sampler}")
        if self.guidance_power < 0:
            raise UserError(f"guidance_power is {self.guidance_power}; it must be 0 or more")
        if self.guidance_channels < 0:
            raise UserError(f"guidance_channels is {self.guidance_channels}; 0 (all) or more")
        low, high = self.guidance_low, self.guidance_high
        if not (0 <= low <= 1 and 0 <= high <= 1):
            raise UserError(f"guidance_low {low} and guidance_high {high} must be in [0, 1]")
        if low > high:
            raise UserError(f"guidance_low {low} is above guidance_high {high}; swap them")
        if self.guidance_skip_tolerance < 0:
            raise UserError(
                f"guidance_skip_tolerance is {self.guidance_skip_tolerance}; it must be 0 or more"
            )
        if self.guided and not num_classes:
            raise UserError(
                "an unconditional model takes no guidance: set guidance_scale to 1 and guidance to "
                "power_cosine"
            )

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is needed at all."""
        return self.guidance == "power_cosine_printed" or self.guidance_scale != 1

    def schedule(self) -> sch.Schedule:
        """The steps to visit."""
        schedule = sch.linear_schedule(self.diffusion_steps)
        return sch.respace(schedule, sch.SPACINGS[self.spacing](self.num_steps, schedule))

    def make_sampler(self) -> Sampler:
        limit = 1.0 if self.clip_denoised else None
        return dataclasses.replace(SAMPLERS[self.sampler](self.eta), limit=limit)

    def weight(self, t: jax.Array, scale) -> jax.Array:
        """Guidance's weight at t [B], for a scale or one of each sample [B]."""
        weight = WEIGHTS[self.guidance](t, scale, self.guidance_power, self.diffusion_steps)
        weight = snap_to_one(weight, self.guidance_skip_tolerance)
        return limit_to_interval(
            t, weight, self.guidance_low, self.guidance_high, self.diffusion_steps
        )

    def guided_evaluations(self, scales: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
        """For each evaluation of the network whether both halves are evaluated: [E] bool.

        scales: of the samples; default: `guidance_scale` for all.
        """
        schedule = self.schedule()
        t = visited(schedule, self.make_sampler().indices(self.num_steps))
        each = np.unique([self.guidance_scale] if scales is None else scales)
        if self.guidance != "power_cosine_printed" and (each == 1).all():
            return np.zeros(len(t), bool)
        low, high, total = self.guidance_low, self.guidance_high, self.diffusion_steps
        needed = np.asarray(limit_to_interval(t, jnp.zeros(len(t)), low, high, total)) == 0
        if self.guidance_skip_tolerance:
            weights = [np.asarray(self.weight(t, float(scale))) for scale in each]
            needed &= (np.stack(weights) != 1).any(0)
        return needed


def defaults(num_classes: int) -> SampleOptions:
    """The published options; of a model without classes, without guidance."""
    return SampleOptions() if num_classes else SampleOptions(**UNGUIDED)


def _name_of(kind: str | type) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, …, num_classes−1, 0, 1, …: `count` labels, every class equally often."""
    return np.arange(count, dtype=np.int32) % max(num_classes, 1)


def random_labels(count: int, num_classes: int, seed: int) -> np.ndarray:
    """`count` labels, uniform at random; label n depends on the seed and n alone."""
    random = np.random.default_rng([seed, num_classes, 2])  # a stream apart from the data's
    return random.integers(num_classes, size=count, dtype=np.int32)


def check_labels(labels: Sequence[int] | np.ndarray, num_classes: int) -> None:
    """Raise UserError for a label that is no whole number or is outside the classes."""
    if np.ndim(labels) != 1:
        raise UserError(f"labels have the shape {np.shape(labels)}; it must be [N]")
    for label in np.asarray(labels, object):
        if not isinstance(label, numbers.Integral):
            raise UserError(f"label {label!r} is not a whole number")
        if num_classes and not 0 <= int(label) < num_classes:
            raise UserError(f"label {label} is outside the classes 0 to {num_classes - 1}")


def check_finite(samples: np.ndarray, name: Callable[[int], str]) -> None:
    """Raise NotFiniteError for samples [N, …] with NaN or infinity; name(i) names the first."""
    finite = np.isfinite(samples).all(tuple(range(1, samples.ndim)))
    if not finite.all():
        raise NotFiniteError(
            f"{name(int(finite.argmin()))} holds NaN or infinity: the weights are damaged or their "
            "run diverged; where they are sound, a smaller guidance_scale or float32 helps"
        )


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that is no whole number in [0, 2^31)."""
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed}; it must be a whole number in [0, 2^31)")
