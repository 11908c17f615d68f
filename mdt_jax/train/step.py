"""One training step: a full and a masked pass, one optimiser update, one EMA update.

`draw_step` draws all of a step's randomness. The loss is a pure function of parameters, batch and
these draws.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax.diffusion.losses import diffusion_losses, flow_losses, weights_of_samples
from mdt_jax.diffusion.schedule import linear_schedule
from mdt_jax.models import masking, xla
from mdt_jax.models.autoencoder import LatentNorm
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import keys, parallel, progress
from mdt_jax.train.optimizers import ema_schedule, rate_schedule
from mdt_jax.train.state import TrainState
from mdt_jax.weights.vae import from_uint8, norm_of

LABEL_DROPOUT = 0.1
# diffusion.timesteps → times from 0 to 1. logit_normal: Esser et al. 2024, arXiv 2403.03206, with
# mean 0 and deviation 1.
FLOW_TIMES = {
    "uniform": jax.random.uniform,
    "logit_normal": lambda key, shape: jax.nn.sigmoid(jax.random.normal(key, shape)),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises: the config's `mask` and `diffusion` fields, see docs/config.md."""

    ratio: float = 0.3
    ratio_max: float = 0.0
    passes: str = "both"
    loss_on: str = "all"
    loss_weight: str = "uniform"
    steps: int = 1000
    objective: str = "epsilon"
    timesteps: str = "uniform"

    @property
    def is_flow(self) -> bool:
        return self.objective == "flow"

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Objective":
        fields = {**config.mask, **config.diffusion}
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


class Draws(NamedTuple):
    """All the randomness of one step. Both passes share t; the rest is drawn for each."""

    t: jax.Array  # [B] int32, 0…T−1; of flow float32, from 0 (noise) to 1
    noise_full: jax.Array  # [B, H, W, C] float32, standard normal
    noise_masked: jax.Array
    drop_full: jax.Array  # [B] bool: replace the label by the null label
    drop_masked: jax.Array
    mask_noise: jax.Array  # [B, L] float32, uniform: the tokens with the smallest are kept
    ratio_u: jax.Array  # [] float32, uniform: the position between ratio and ratio_max
    posterior: jax.Array | None = None  # [B, H, W, C] standard normal, for the VAE's posterior


def draw_step(
    key: jax.Array,
    step: jax.Array,
    model: MDT,
    batch: int,
    diffusion_steps: int,
    flow_times: str | None = None,
) -> Draws:
    """The draws of `step`: a pure function of (key, step), the same on any number of devices.

    flow_times: how the times of flow are distributed; None: draw steps of diffusion.
    """
    subkeys = jax.random.split(jax.random.fold_in(key, step), 8)
    shape = (batch, *model.input_size, model.in_channels)
    return Draws(
        t=jax.random.randint(subkeys[0], (batch,), 0, diffusion_steps)
        if flow_times is None
        else FLOW_TIMES[flow_times](subkeys[0], (batch,)),
        noise_full=jax.random.normal(subkeys[1], shape),
        noise_masked=jax.random.normal(subkeys[2], shape),
        drop_full=jax.random.bernoulli(subkeys[3], LABEL_DROPOUT, (batch,)),
        drop_masked=jax.random.bernoulli(subkeys[4], LABEL_DROPOUT, (batch,)),
        mask_noise=jax.random.uniform(subkeys[5], (batch, model.num_tokens)),
        ratio_u=jax.random.uniform(subkeys[6]),
        posterior=jax.random.normal(subkeys[7], shape),
    )


def batch_shapes(config: ConfigDict, model: MDT, sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch: "labels", and "images" (uint8) or a VAE's posterior, "mean" and "std".

    The posterior is float16 in a latent cache, float32 where the VAE encodes images on the fly.
    """
    size = config.data.batch_size
    shape = (size, *model.input_size, model.in_channels)
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {"labels": ((size,), jnp.int32)}
    if config.vae.path == "identity":
        arrays["images"] = (shape, jnp.uint8)
    else:
        dtype = jnp.float16 if config.data.name == "latents" else jnp.float32
        arrays |= {"mean": (shape, dtype), "std": (shape, dtype)}
    return {name: jax.ShapeDtypeStruct(*array, sharding=sharding) for name, array in arrays.items()}


def batch_latents(batch: dict, noise: jax.Array | None, norm: LatentNorm) -> jax.Array:
    """The training data of a batch (see `batch_shapes`), [B, H, W, C] float32.

    Pixels in [−1, 1], or mean + std·noise, a sample of the VAE's posterior, normalised.
    """
    if "images" in batch:
        return from_uint8(batch["images"])
    mean, std = (batch[name].astype(jnp.float32) for name in ("mean", "std"))
    return norm.apply(mean + std * noise)


class Pass(NamedTuple):
    """One of a step's two forward passes."""

    noise: jax.Array  # [B, H, W, C] float32
    drop: jax.Array  # [B] bool: replace the label by the null label
    keep_ids: jax.Array | None = None  # [B, K] int32, the tokens the encoder sees; None: all
    keep_count: jax.Array | None = None  # [] int32: only the first of keep_ids; None: all K
    loss_mask: jax.Array | None = None  # [B, H, W, 1] bool, the pixels that count; None: all


def make_passes(model: MDT, objective: Objective, draws: Draws) -> dict[str, Pass]:
    """The passes of a step by name, "full" and "masked"."""
    passes = {}
    if objective.passes != "masked":
        passes["full"] = Pass(draws.noise_full, draws.drop_full)
    if objective.passes != "full":
        # The length is static, so that one program serves every ratio drawn.
        length = masking.keep_length(model.num_tokens, objective.ratio)
        keep_ids = masking.keep_ids(draws.mask_noise, length)
        keep_count = _drawn_count(model, objective, draws)
        mask = None
        if objective.loss_on == "masked":
            mask = _masked_pixels(model, keep_ids, keep_count)
        passes["masked"] = Pass(draws.noise_masked, draws.drop_masked, keep_ids, keep_count, mask)
    return passes


def _drawn_count(model: MDT, objective: Objective, draws: Draws) -> jax.Array | None:
    """The number of tokens the masked pass keeps, [] int32; None where it is not drawn."""
    ratio, ratio_max = objective.ratio, objective.ratio_max
    if objective.passes == "full" or ratio_max <= ratio:
        return None
    return masking.keep_count(model.num_tokens, ratio, ratio_max, draws.ratio_u)


def _masked_pixels(model: MDT, keep_ids: jax.Array, keep_count: jax.Array | None) -> jax.Array:
    """[B, H, W, 1] bool, true on the patches of masked tokens."""
    masked = ~masking.kept_tokens(keep_ids, keep_count, model.num_tokens).visible
    patches = masked.reshape(-1, *model.grid, 1)
    return patches.repeat(model.patch_size, axis=1).repeat(model.patch_size, axis=2)


def sample_losses(
    model: MDT, objective: Objective, params: dict, batch: dict, draws: Draws
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and its terms for each sample. A pure function.

    batch: {"latents": [B, H, W, C] float32, "labels": [B] int32}.
    The loss is the sum over the passes of mean(weight·mse + vb); flow has no vb. The terms, [B]
    float32, are for each pass `loss`, `mse` (not weighted), `vb` and, where the weight is not 1,
    `weighted_mse`.
    """
    params = model.prepare(params)
    schedule = linear_schedule(objective.steps)
    weights = weights_of_samples(objective.loss_weight, objective.objective, schedule, draws.t)
    passes = make_passes(model, objective, draws)
    terms = {}
    for name, each in passes.items():
        labels = jnp.where(each.drop, model.num_classes, batch["labels"])
        network = functools.partial(_predict, model, params, labels, each)
        data = batch["latents"], draws.t, each.noise, each.loss_mask
        if objective.is_flow:
            losses = flow_losses(network, *data)
        else:
            losses = diffusion_losses(network, schedule, *data, objective.objective)
        weighted = weights * losses["mse"]
        if objective.loss_weight != "uniform":
            losses["weighted_mse"] = weighted
        losses["loss"] = weighted + losses["vb"] if "vb" in losses else weighted
        terms |= {f"{term}/{name}": value for term, value in losses.items()}
    loss = sum(terms[f"loss/{name}"].mean() for name in passes)
    return cast(jax.Array, loss), terms


def _predict(model: MDT, params: dict, labels: jax.Array, pass_: Pass, x, t) -> Any:
    # Any, since Flax annotates `apply` with everything it may return.
    return model.apply({"params": params}, x, t, labels, pass_.keep_ids, pass_.keep_count)


def summary(
    model: MDT, objective: Objective, terms: dict[str, jax.Array], draws: Draws
) -> dict[str, jax.Array]:
    """The metrics of a step: the means of `sample_losses`' terms, over all t and by quarter of t.

    `kept` is the number of tokens the masked pass kept, where it is drawn.
    """
    metrics = {name: values.mean() for name, values in terms.items()}
    loss = sum(value for name, value in metrics.items() if name.startswith("loss/"))
    for name, values in terms.items():
        if not name.startswith("loss/"):
            metrics |= _by_quartile(values, _quartile(objective, draws.t), name)
    kept = _drawn_count(model, objective, draws)
    if kept is not None:
        metrics["kept"] = kept
    return {"loss": cast(jax.Array, loss), **metrics}


def _quartile(objective: Objective, t: jax.Array) -> jax.Array:
    """The quarter of the times, [B] int32: 0, the least noise, to 3."""
    if objective.is_flow:
        return jnp.clip(4 * (1 - t), 0, 3).astype(jnp.int32)
    return t * 4 // objective.steps


def _by_quartile(values: jax.Array, quartile: jax.Array, name: str) -> dict[str, jax.Array]:
    """The mean of the samples in each quarter of the timesteps; NaN where there is none."""
    return {
        f"{name}/q{q + 1}": jnp.where(quartile == q, values, 0).sum() / (quartile == q).sum()
        for q in range(4)
    }


def _accumulate(gradient: Callable, params: dict, batch: dict, draws: Draws, count: int):
    """`gradient` of a batch in `count` microbatches, one after the other; float32 sums."""
    if count == 1:
        return gradient(params, batch, draws)

    def add(total, microbatch):
        grads, terms = gradient(params, *microbatch)
        return jax.tree.map(jnp.add, total, grads), terms

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, terms = jax.lax.scan(add, zeros, _microbatches((batch, draws), count))
    grads = jax.tree.map(lambda leaf: leaf / count, total)
    return grads, {name: each.swapaxes(0, 1).reshape(-1) for name, each in terms.items()}


def _microbatches(tree, count: int):
    """Arrays [B, …] → [count, B / count, …]; scalars are repeated.

    A microbatch takes every count-th row, so that the rows of a device stay there.
    """

    def split(array):
        if array.ndim == 0:
            return jnp.broadcast_to(array, count)
        return array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def make_train_step(
    model: MDT,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: optax.ScalarOrSchedule,
    accumulate: int = 1,
    schedule: optax.Schedule = lambda step: 1.0,
) -> Callable[[TrainState, dict, Draws, jax.Array], tuple[TrainState, dict]]:
    """The function (state, batch, draws, learning rate) → (state, metrics), for the caller to jit.

    optimizer: as `make_optimizer` returns it, for a learning rate of 1.
    ema_decay: a number, or a function of the steps taken.
    accumulate: the number of microbatches; the step is that of the whole batch.
    schedule: the factor of the learning rate, as of `rate_schedule`.
    A step whose loss or gradient norm is not finite leaves parameters, optimiser and EMA unchanged
    and is counted.
    """
    gradient = jax.grad(functools.partial(sample_losses, model, objective), has_aux=True)

    def train_step(
        state: TrainState, batch: dict, draws: Draws, learning_rate: jax.Array
    ) -> tuple[TrainState, dict]:
        grads, terms = _accumulate(gradient, state.params, batch, draws, accumulate)
        metrics = summary(model, objective, terms, draws)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = rate = learning_rate * schedule(state.step)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        old = state.params, state.ema, state.opt_state
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates = jax.tree.map(lambda update: rate * update, updates)
            params = cast(dict, optax.apply_updates(state.params, updates))
            decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
            # Not by a condition, for whose branches XLA would copy the state.
            new = params, ema, opt_state
            select = functools.partial(jnp.where, finite)
            params, ema, opt_state = jax.tree.map(select, new, old)
        skipped = (~finite).astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=params,
            ema=ema,
            opt_state=opt_state,
            skipped=state.skipped + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        metrics |= {"skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
        return state, metrics

    return train_step


def trace_step(
    config: ConfigDict,
    model: MDT,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
) -> jax.stages.Traced:
    """The training step of a config: (state, batch, key, learning rate) → (state, metrics).

    state: shapes with their shardings; the state is donated. key: the run's key for training, see
    `draw_step`. The learning rate is a [] float32 argument: changing it does not recompile.
    The schedule is a part of the program, and with it the ratio of optim.end_lr to the rate.
    """
    objective, size = Objective.from_config(config), config.data.batch_size
    norm = norm_of(config)
    platform = mesh.devices.flat[0].platform
    progress.log_once(xla.refusal(model, platform))
    model = xla.for_devices(model, platform, mesh.size, mesh)
    if mesh.shape["fsdp"] > 1:
        model = model.clone(gather=functools.partial(parallel.gathered, mesh))
    schedule = rate_schedule(config.optim, config.train.steps)
    train_step = make_train_step(
        model, objective, optimizer, ema_schedule(config.optim), config.train.accumulate, schedule
    )

    def step_with_draws(state, batch, key, learning_rate):
        flow_times = objective.timesteps if objective.is_flow else None
        draws = draw_step(key, state.step, model, size, objective.steps, flow_times)
        latents = batch_latents(batch, draws.posterior, norm)
        batch = {"latents": latents, "labels": batch["labels"]}
        return train_step(state, batch, draws._replace(posterior=None), learning_rate)

    replicated = parallel.replicated(mesh)
    batch = batch_shapes(config, model, parallel.split_batch(mesh))
    key = jax.eval_shape(keys.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step_with_draws, donate_argnums=0, out_shardings=(shardings, replicated))
    with jax.default_matmul_precision(config.train.precision):
        return jitted.trace(state, batch, key, rate)


def compile_step(
    config: ConfigDict,
    model: MDT,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    compiler_options: dict | None = None,
) -> jax.stages.Compiled:
    """`trace_step`, compiled without being run."""
    return trace_step(config, model, optimizer, state, mesh).lower().compile(compiler_options)
