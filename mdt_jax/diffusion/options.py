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
from mdt_jax.diffusion.samplers import FLOW_SAMPLERS, SAMPLERS, Sampler
from mdt_jax.runtime.backend import HIGHEST, PRECISIONS
from mdt_jax.runtime.bounds import ANY, Bound, at_least, between, check, half_open, one_of
from mdt_jax.runtime.errors import NotFiniteError, UserError

# What a model without classes takes.
UNGUIDED: dict[str, Any] = {"guidance_scale": 1.0, "guidance": "power_cosine"}
# Options that a config has in the groups `diffusion` and `train`, not in `sample`.
NOT_IN_SAMPLE = ("objective", "diffusion_steps", "precision")
# What a network predicts → the samplers that it takes, first the one where none is chosen.
SAMPLERS_OF = {"epsilon": SAMPLERS, "v": SAMPLERS, "flow": FLOW_SAMPLERS}
PREDICTS = {"epsilon": "noise", "v": "v", "flow": "velocity"}
# The weaker prediction of guidance: without the class, by the masked pass; or another network's.
OWN_GUIDES = ("null", "masked")
GUIDES = (*OWN_GUIDES, "network")
# The values of a config's sample.clip_denoised.
CLIPPING = {"auto": None, "true": True, "false": False}


def option(default: Any, help: str, bound: Bound = ANY) -> Any:
    """A field of SampleOptions; its help is also that of the config's field and of the flag."""
    return dataclasses.field(default=default, metadata={"help": help, "bound": bound})


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How samples are drawn; the defaults are the published ones.

    A config's group `sample` and the flags of mdt_jax.sample and mdt_jax.inpaint are made from
    these fields. diffusion_steps: T, the steps of the training schedule.
    """

    sampler: str = option(
        "ddpm", "update rule of a sampling step", one_of([*(SAMPLERS | FLOW_SAMPLERS)])
    )
    num_steps: int = option(
        250, "sampling steps; heun evaluates the network twice each", at_least(1)
    )
    spacing: str = option(
        "even", "spacing of the steps; stride: as the published ddimN", one_of(sch.SPACINGS)
    )
    eta: float = option(0.0, "noise of ddim, from 0 (deterministic) to 1", between(0, 1))
    guidance_scale: float = option(3.8, "scale of classifier-free guidance; 1: no guidance")
    guidance_power: float = option(4.0, "exponent of power_cosine; 0: constant", at_least(0))
    guidance: str = option(
        "power_cosine",
        "guidance weight over time: power_cosine as in the code, power_cosine_printed as in the "
        "paper of MDT",
        one_of(WEIGHTS),
    )
    guidance_channels: int = option(3, "first channels to guide; 0: all", at_least(0))
    guidance_low: float = option(
        0.0, "guidance acts from this share of the timesteps (0: clean)", between(0, 1)
    )
    guidance_high: float = option(
        1.0, "guidance acts up to this share of the timesteps (1: noise)", between(0, 1)
    )
    guidance_skip_tolerance: float = option(
        0.0, "guidance weights this close to 1 count as 1 and cost half", at_least(0)
    )
    guide: str = option(
        "null",
        "what guidance leads away from: null, the prediction without a class; masked, the masked "
        "pass; network, a weaker network",
        one_of(GUIDES),
    )
    guide_ratio: float = option(0.5, "share of tokens that guide=masked masks", half_open(0, 1))
    encoder_every: int = option(
        1, "evaluate the encoder in each n-th evaluation, and extrapolate between", at_least(1)
    )
    encoder_order: int = option(1, "degree of the extrapolation", between(0, 2))
    clip_denoised: bool | None = option(
        None, "clip the predicted clean sample to [-1, 1] at each step (default: pixels only)"
    )
    objective: str = option(
        "epsilon",
        "what the network predicts: epsilon, the noise; v; or flow, the velocity, as SiT does",
        one_of(SAMPLERS_OF),
    )
    diffusion_steps: int = option(1000, "steps of the training schedule")
    precision: str = option(
        HIGHEST, "precision of float32 matmuls on accelerators, the VAE's too", one_of(PRECISIONS)
    )

    @classmethod
    def from_config(cls, config) -> "SampleOptions":
        """From a config's `sample` and `diffusion` fields, and its precision."""
        names = {field.name for field in dataclasses.fields(cls)} - set(NOT_IN_SAMPLE)
        values = {name: config.sample[name] for name in names}
        values["clip_denoised"] = CLIPPING[config.sample.clip_denoised]
        options = cls(
            **values,
            objective=config.diffusion.objective,
            diffusion_steps=config.diffusion.steps,
            precision=config.train.precision,
        )
        return options.clipping_for(config.vae.path == "identity")

    def clipping_for(self, pixels: bool) -> "SampleOptions":
        """With `clip_denoised` decided where it is None: on for pixels, off for latents."""
        if self.clip_denoised is not None:
            return self
        return dataclasses.replace(self, clip_denoised=pixels)

    def check(self, num_classes: int) -> None:
        """Raise UserError, naming the option, for options that a model cannot be sampled with."""
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name), field.type, field.metadata["bound"])
        steps, low, high = self.num_steps, self.guidance_low, self.guidance_high
        if self.sampler not in SAMPLERS_OF[self.objective]:
            raise UserError(
                f"sampler is {self.sampler}; a network that predicts "
                f"{PREDICTS[self.objective]} takes one of "
                f"{', '.join(SAMPLERS_OF[self.objective])}"
            )
        if self._is_flow and self.spacing != "even":
            raise UserError(f"spacing is {self.spacing}; the steps of flow are even")
        if steps > self.diffusion_steps and not self._is_flow:
            raise UserError(
                f"num_steps is {steps}; it must be between 1 and the {self.diffusion_steps} steps "
                "of the training schedule"
            )
        try:
            self.schedule()
        except ValueError as error:
            raise UserError(f"num_steps {steps} with spacing {self.spacing}: {error}") from None
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta is {self.eta}; the sampler {self.sampler} has no eta")
        if low > high:
            raise UserError(f"guidance_low {low} is above guidance_high {high}; swap them")
        for name, used, why in (
            ("guide_ratio", self.guide == "masked", f"guide={self.guide}"),
            ("encoder_order", self.encoder_every > 1, "encoder_every=1"),
        ):
            value, default = getattr(self, name), getattr(SampleOptions, name)
            if value != default and not used:
                raise UserError(f"{name}={value} has no effect with {why}; leave it at {default}")
        if self.encoder_every > 1 and self.guide == "masked":
            raise UserError(
                f"encoder_every is {self.encoder_every}; with guide=masked the encoder has other "
                "tokens in each evaluation, so that nothing can be extrapolated"
            )
        if self.guided and not num_classes and self.guide == "null":
            raise UserError(
                "an unconditional model takes no guidance: set guidance_scale to 1 and guidance to "
                "power_cosine"
            )

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is needed at all."""
        return self.guidance == "power_cosine_printed" or self.guidance_scale != 1

    @property
    def _is_flow(self) -> bool:
        return self.objective == "flow"

    def schedule(self) -> sch.Schedule:
        """The steps to visit."""
        if self._is_flow:
            return sch.flow_schedule(self.num_steps)
        schedule = sch.linear_schedule(self.diffusion_steps)
        return sch.respace(schedule, sch.SPACINGS[self.spacing](self.num_steps, schedule))

    def make_sampler(self) -> Sampler:
        limit = 1.0 if self.clip_denoised else None
        sampler = SAMPLERS_OF[self.objective][self.sampler](self.eta)
        return dataclasses.replace(sampler, limit=limit, objective=self.objective)

    def weight(self, t: jax.Array, scale) -> jax.Array:
        """Guidance's weight at t [B], for a scale or one of each sample [B].

        t: as the network takes it, in 0…T−1, or of flow from 0 (noise) to 1.
        """
        if self._is_flow:
            t = self.diffusion_steps * (1 - t)
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
        t = self.make_sampler().times(schedule)
        each = np.unique([self.guidance_scale] if scales is None else scales)
        if self.guidance != "power_cosine_printed" and (each == 1).all():
            return np.zeros(len(t), bool)
        low, high, total = self.guidance_low, self.guidance_high, self.diffusion_steps
        time = total * (1 - t) if self._is_flow else t
        needed = np.asarray(limit_to_interval(time, jnp.zeros(len(t)), low, high, total)) == 0
        if self.guidance_skip_tolerance:
            weights = [np.asarray(self.weight(t, float(scale))) for scale in each]
            needed &= (np.stack(weights) != 1).any(0)
        return needed

    def encoder_schedule(self, guided: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """When the encoder is evaluated: (fresh [E] bool, weights [E, encoder_order + 1] float32).

        guided: of each evaluation. An evaluation that is not fresh takes the residual Σ_j
        weights[k, j]·residual_j of the last fresh evaluations, the newest first: the polynomial
        through them, in the number of the step at whose time they are. Where guidance begins, the
        unguided evaluations before have no residual of the weaker prediction: all starts anew.
        Liu et al. 2025, arXiv 2503.06923, extrapolate by finite differences.
        """
        fresh = np.zeros(len(guided), bool)
        weights = np.zeros((len(guided), self.encoder_order + 1), np.float32)
        # Two of Heun's evaluations may have one time: of these the newer one counts.
        step = np.cumsum(np.diff(self.make_sampler().times(self.schedule()), prepend=-1) != 0)
        known: list[int] = []
        for k, now in enumerate(guided):
            if not k or (now and not guided[k - 1]):
                known = []
            fresh[k] = not known or k - known[0] >= self.encoder_every
            if fresh[k]:
                known = [k, *known][: self.encoder_order + 1]
            places = step[known]
            for j, place in enumerate(places):
                if place not in places[:j]:
                    others = np.setdiff1d(places, place).astype(float)
                    weights[k, j] = np.prod((step[k] - others) / (place - others))
        return fresh, weights


SampleOptions.__doc__ = "\n    ".join(
    [SampleOptions.__doc__ or ""]
    + [f"{field.name}: {field.metadata['help']}" for field in dataclasses.fields(SampleOptions)]
)


def defaults(num_classes: int) -> SampleOptions:
    """The published options; of a model without classes, without guidance."""
    return SampleOptions() if num_classes else SampleOptions(**UNGUIDED)


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
