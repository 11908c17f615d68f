"""Labels → images: guidance, sampler and noise put together, batch by batch."""

import dataclasses
import functools
import numbers
from collections.abc import Sequence

import jax
import numpy as np

from mdt_jax import distributed, parallel
from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.guidance import WEIGHTS, guide
from mdt_jax.diffusion.samplers import SAMPLERS, sample
from mdt_jax.errors import UserError
from mdt_jax.models.mdt import MDT
from mdt_jax.progress import progress_bar

# While the progress is shown, a batch is drawn in at most so many parts.
PARTS = 50

SPACINGS = {"even": sch.spaced_timesteps, "stride": sch.strided_timesteps}


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How samples are drawn; the defaults are the published ones."""

    sampler: str = "ddpm"
    num_steps: int = 250
    spacing: str = "even"
    guidance_scale: float = 3.8
    guidance_power: float = 4.0
    guidance: str = "power_cosine"
    guidance_channels: int = 3
    diffusion_steps: int = 1000

    @classmethod
    def from_config(cls, config) -> "SampleOptions":
        """From a config's `sample` and `diffusion` fields."""
        names = {field.name for field in dataclasses.fields(cls)} - {"diffusion_steps"}
        fields = {name: config.sample[name] for name in names}
        return cls(**fields, diffusion_steps=config.diffusion.steps)

    def check(self, num_classes: int) -> None:
        """Raise UserError, naming the option, for what cannot be sampled."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            wanted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
            if not isinstance(value, wanted):
                raise UserError(f"{field.name} is {value!r}; it must be of type {kind.__name__}")
        for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS), ("guidance", WEIGHTS)):
            if getattr(self, name) not in known:
                choices = ", ".join(known)
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose one of {choices}")
        if not 1 <= self.num_steps <= self.diffusion_steps:
            raise UserError(
                f"num_steps is {self.num_steps}; it must be between 1 and the "
                f"{self.diffusion_steps} steps of the training schedule"
            )
        try:
            SPACINGS[self.spacing](self.num_steps, self.diffusion_steps)
        except ValueError as error:
            raise UserError(
                f"num_steps {self.num_steps} with spacing {self.spacing}: {error}"
            ) from None
        if not np.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale is {self.guidance_scale}; it must be a finite number")
        if not 0 <= self.guidance_power < np.inf:
            raise UserError(f"guidance_power is {self.guidance_power}; it must be 0 or more")
        if self.guidance_channels < 0:
            raise UserError(f"guidance_channels is {self.guidance_channels}; 0 (all) or more")
        if self.guided and not num_classes:
            raise UserError(
                "an unconditional model takes no guidance: set guidance_scale to 1 and guidance to "
                "power_cosine"
            )

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is needed at all."""
        return self.guidance != "power_cosine" or self.guidance_scale != 1

    def schedule(self) -> sch.Schedule:
        timesteps = SPACINGS[self.spacing](self.num_steps, self.diffusion_steps)
        return sch.respace(sch.linear_schedule(self.diffusion_steps), timesteps)


def _draws(model: MDT, key: jax.Array, indices: jax.Array, k: jax.Array) -> jax.Array:
    """Draw number k of each of the samples `indices` [B], [B, H, W, C] standard normal."""
    shape = (*model.input_size, model.in_channels)

    def one(n):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, n), k), shape)

    return jax.vmap(one)(indices)


_first_noise = jax.jit(_draws, static_argnums=0)


@functools.partial(jax.jit, static_argnames=("model", "options"), donate_argnames="x")
def _run_steps(model: MDT, options: SampleOptions, params, key, indices, labels, x, start, stop):
    """Take samples number `indices` [B] of classes `labels` [B] from x through some steps."""

    def network(x, t, y):
        return model.apply({"params": params}, x, t, y)

    if options.guided:
        weight = functools.partial(
            WEIGHTS[options.guidance],
            scale=options.guidance_scale,
            power=options.guidance_power,
            total=options.diffusion_steps,
        )
        channels = options.guidance_channels or None
        denoise = guide(network, labels, model.num_classes, weight, channels)
    else:
        denoise = functools.partial(network, y=labels)

    def noise(k):
        return _draws(model, key, indices, k + 1)

    return sample(denoise, SAMPLERS[options.sampler], options.schedule(), x, noise, start, stop)


def generate(
    model: MDT,
    params: dict,
    labels: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    options: SampleOptions | None = None,
    **changes,
) -> np.ndarray:
    """Draw one sample for each label.

    labels: N ints in 0…num_classes−1 (an unconditional model reads only how many there are).
    seed: sample n depends on (seed, n, its label) alone, not on batch_size or the devices.
    changes: fields of `options`, such as num_steps=250, guidance_scale=3.8, sampler="ddim".
    Returns [N, H, W, C] float32, what the model was trained on: pixels in about [−1, 1], not
    clipped (`mdt_jax.to_uint8` makes images of them). Raises UserError for options and labels that
    make no sense.
    """
    try:
        options = dataclasses.replace(options or SampleOptions(), **changes)
    except TypeError as error:
        raise UserError(f"generate: {error}") from None
    options.check(model.num_classes)
    check_labels(labels, model.num_classes)
    labels = np.asarray(labels, np.int32)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    check_seed(seed)

    mesh = parallel.mesh_of(params)
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)
    params = parallel.put(params, whole)
    key = jax.jit(jax.random.key, out_shardings=whole)(seed)
    # Every batch has one shape, a multiple of the devices: the program compiles once.
    size = -(-min(batch_size, len(labels)) // mesh.size) * mesh.size if len(labels) else mesh.size
    batches = range(0, len(labels), size)
    # Stops on the way are only for the bar to move; the program is the same for any part.
    part = -(-options.num_steps // PARTS) if progress else options.num_steps
    images = []
    show = progress and jax.process_index() == 0
    with progress_bar(len(batches) * options.num_steps, show, "sampling", "step") as bar:
        for start in batches:
            indices = np.arange(start, start + size, dtype=np.int32)
            inputs = (indices, labels[np.minimum(indices, len(labels) - 1)])
            inputs = parallel.put(inputs, split)
            x = _first_noise(model, key, inputs[0], 0)
            for step in range(0, options.num_steps, part):
                stop = min(step + part, options.num_steps)
                x = _run_steps(model, options, params, key, *inputs, x, step, stop)
                x.block_until_ready()
                bar.update(stop - step)
            images.append(distributed.fetch(x))
    shape = (*model.input_size, model.in_channels)
    return np.concatenate([np.zeros((0, *shape), np.float32), *images])[: len(labels)]


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, …, num_classes−1, 0, 1, …: `count` labels, every class equally often."""
    return np.arange(count, dtype=np.int32) % max(num_classes, 1)


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise UserError for a label that is no whole number or is outside the classes."""
    for label in np.asarray(labels, object).reshape(-1):
        if not isinstance(label, numbers.Integral):
            raise UserError(f"label {label!r} is not a whole number")
        if num_classes and not 0 <= label < num_classes:
            raise UserError(f"label {label} is outside the classes 0 to {num_classes - 1}")


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that is not in [0, 2^31)."""
    if not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed}; it must be in [0, 2^31)")
