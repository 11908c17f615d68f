"""One training step: a full and a masked pass, one optimiser update, one EMA update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax.diffusion.losses import LOSS_WEIGHTS, diffusion_losses
from mdt_jax.diffusion.schedule import extract, linear_schedule
from mdt_jax.models import masking, xla
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import keys, parallel
from mdt_jax.train.state import TrainState
from mdt_jax.weights.vae import from_uint8

LABEL_DROPOUT = 0.1


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises: the config's `mask` and `diffusion` fields, see mdt_jax/config.py."""

    ratio: float = 0.3
    ratio_max: float = 0.0
    passes: str = "both"
    loss_on: str = "all"
    loss_weight: str = "uniform"
    steps: int = 1000

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Objective":
        fields = {**config.mask, **config.diffusion}
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


class Draws(NamedTuple):
    """All the randomness of one step. Both passes share t; the rest is each one's own."""

    t: jax.Array  # [B] int32, 0…T−1
    noise_full: jax.Array  # [B, H, W, C] float32, standard normal
    noise_masked: jax.Array
    drop_full: jax.Array  # [B] bool: replace the label by the null label
    drop_masked: jax.Array
    mask_noise: jax.Array  # [B, L] float32, uniform: the smallest are kept
    ratio_u: jax.Array  # [] float32, uniform: where between ratio and ratio_max
    posterior: jax.Array | None = None  # [B, H, W, C] standard normal: what the VAE's latents are


def draw(key: jax.Array, step: jax.Array, model: MDT, batch: int, diffusion_steps: int) -> Draws:
    """The draws of `step`: a pure function of (key, step), the same on any number of devices."""
    each = jax.random.split(jax.random.fold_in(key, step), 8)
    shape = (batch, *model.input_size, model.in_channels)
    return Draws(
        t=jax.random.randint(each[0], (batch,), 0, diffusion_steps),
        noise_full=jax.random.normal(each[1], shape),
        noise_masked=jax.random.normal(each[2], shape),
        drop_full=jax.random.bernoulli(each[3], LABEL_DROPOUT, (batch,)),
        drop_masked=jax.random.bernoulli(each[4], LABEL_DROPOUT, (batch,)),
        mask_noise=jax.random.uniform(each[5], (batch, model.num_tokens)),
        ratio_u=jax.random.uniform(each[6]),
        posterior=jax.random.normal(each[7], shape),
    )


def latents_of(batch: dict, draws: Draws, scale: float) -> jax.Array:
    """[B, H, W, C] float32, what the model is trained on, of a batch as `batch_shapes` has it.

    Pixels in [−1, 1]; or (mean + std·noise)·scale, a draw from the VAE's posterior.
    """
    if "images" in batch:
        return from_uint8(batch["images"])
    mean, std = (batch[name].astype(jnp.float32) for name in ("mean", "std"))
    return (mean + std * draws.posterior) * scale


def batch_shapes(config: ConfigDict, model: MDT, sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch is: "labels", and "images" (uint8), or "mean" and "std" of a VAE's posteriors.

    These are float16 in a cache, float32 where the VAE encodes images on the way.
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


def _by_quartile(values: jax.Array, t: jax.Array, steps: int, name: str) -> dict[str, jax.Array]:
    """Means over the samples of each quarter of the timesteps; NaN where there is none."""
    quartile = t * 4 // steps
    return {
        f"{name}/q{q + 1}": jnp.where(quartile == q, values, 0).sum() / (quartile == q).sum()
        for q in range(4)
    }


def _kept(model: MDT, objective: Objective, draws: Draws) -> tuple[jax.Array, jax.Array | None]:
    """(keep_ids [B, K], keep_count): the tokens the encoder sees in the masked pass."""
    ratio, ratio_max, tokens = objective.ratio, objective.ratio_max, model.num_tokens
    # The length is static, so that one program serves every ratio drawn.
    ids = masking.keep_ids(draws.mask_noise, masking.keep_length(tokens, ratio))
    if ratio_max <= ratio:
        return ids, None
    return ids, masking.keep_count(tokens, ratio, ratio_max, draws.ratio_u)


def _masked_pixels(model: MDT, keep_ids: jax.Array, keep_count: jax.Array | None) -> jax.Array:
    """[B, H, W, 1] bool, true on the patches of masked tokens."""
    places = masking.places(keep_ids, keep_count, model.num_tokens)
    masked = masking.masked_positions(places, model.num_tokens)
    patches = masked.reshape(-1, *model.grid, 1)
    return patches.repeat(model.patch_size, axis=1).repeat(model.patch_size, axis=2)


def sample_losses(
    model: MDT, objective: Objective, params: dict, batch: dict, draws: Draws
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """mean(weight·mse + vb) of the full pass plus the same of the masked pass; and each sample's.

    batch: {"latents": [B, H, W, C] float32, "labels": [B] int32}. A pure function. What is given
    for each sample, [B] float32: of each pass `loss`, `mse` (not weighted), `vb`, and
    `weighted_mse` where the weight is not 1.
    """
    params = model.gather_unstacked(params)
    schedule = linear_schedule(objective.steps)
    weights = extract(LOSS_WEIGHTS[objective.loss_weight](schedule), draws.t).reshape(-1)
    passes = {}
    if objective.passes != "masked":
        passes["full"] = (draws.noise_full, draws.drop_full, None, None, None)
    if objective.passes != "full":
        keep_ids, count = _kept(model, objective, draws)
        where = _masked_pixels(model, keep_ids, count) if objective.loss_on == "masked" else None
        passes["masked"] = (draws.noise_masked, draws.drop_masked, keep_ids, count, where)
    values = {}
    for name, (noise, drop, keep_ids, count, where) in passes.items():
        labels = jnp.where(drop, model.num_classes, batch["labels"])

        # Any, since Flax annotates `apply` with all that it may return.
        def network(x, t, labels=labels, keep_ids=keep_ids, count=count) -> Any:
            return model.apply({"params": params}, x, t, labels, keep_ids, count)

        parts = diffusion_losses(network, schedule, batch["latents"], draws.t, noise, where)
        weighted = weights * parts["mse"]
        if objective.loss_weight != "uniform":
            parts["weighted_mse"] = weighted
        parts["loss"] = weighted + parts["vb"]
        values |= {f"{part}/{name}": each for part, each in parts.items()}
    loss = sum(values[f"loss/{name}"].mean() for name in passes)
    return cast(jax.Array, loss), values


def summary(
    model: MDT, objective: Objective, values: dict[str, jax.Array], draws: Draws
) -> dict[str, jax.Array]:
    """What is logged of a batch's `sample_losses`: means over all, and over quarters of t.

    `kept` is the tokens that a masked pass kept, where their number is drawn.
    """
    metrics = {name: each.mean() for name, each in values.items()}
    loss = sum(value for name, value in metrics.items() if name.startswith("loss/"))
    for name, each in values.items():
        if not name.startswith("loss/"):
            metrics |= _by_quartile(each, draws.t, objective.steps, name)
    if objective.passes != "full" and objective.ratio_max > objective.ratio:
        metrics["kept"] = cast(jax.Array, _kept(model, objective, draws)[1])
    return {"loss": cast(jax.Array, loss), **metrics}


def _parts(tree, count: int):
    """A batch in `count` parts: [B, …] → [count, B / count, …], and what is one for all repeated.

    Each part takes every count-th row, so that the rows of a device stay there.
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
    ema_decay: float,
    accumulate: int = 1,
) -> Callable[[TrainState, dict, Draws, jax.Array], tuple[TrainState, dict]]:
    """The function (state, batch, draws, learning rate) → (state, metrics), for the caller to jit.

    optimizer: as of `make_optimizer`, at a rate of 1.
    accumulate: in how many parts the batch is taken, one after the other; gradients are added in
    float32 and the optimiser is called once, so that the step is that of the whole batch. A step
    whose loss or gradient norm is not finite leaves parameters, optimiser and EMA as they were and
    is counted.
    """
    slopes = jax.grad(functools.partial(sample_losses, model, objective), has_aux=True)

    def gradient(params, batch: dict, draws: Draws):
        if accumulate == 1:
            return slopes(params, batch, draws)

        def add(total, part):
            grads, values = slopes(params, *part)
            return jax.tree.map(jnp.add, total, grads), values

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, values = jax.lax.scan(add, zeros, _parts((batch, draws), accumulate))
        grads = jax.tree.map(lambda leaf: leaf / accumulate, total)
        return grads, {name: each.swapaxes(0, 1).reshape(-1) for name, each in values.items()}

    def train_step(
        state: TrainState, batch: dict, draws: Draws, learning_rate: jax.Array
    ) -> tuple[TrainState, dict]:
        grads, values = gradient(state.params, batch, draws)
        metrics = summary(model, objective, values, draws)
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def update(params, ema, opt_state):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            updates = jax.tree.map(lambda update: learning_rate * update, updates)
            params = optax.apply_updates(params, updates)
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
            return params, ema, opt_state

        def skip(*unchanged):
            return unchanged

        params, ema, opt_state = jax.lax.cond(
            finite, update, skip, state.params, state.ema, state.opt_state
        )
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
    """The step of a config, (state, batch, key, learning rate) → (state, metrics).

    state: shapes with their shardings; it is donated. key: all of a run's draws come from it. The
    learning rate is [] float32; optim.lr does not change the program.
    """
    objective, size = Objective.from_config(config), config.data.batch_size
    model = xla.for_devices(model, mesh.devices.flat[0].platform, mesh.size)
    if mesh.shape["fsdp"] > 1:
        model = model.clone(gather=functools.partial(parallel.gathered, mesh))
    train_step = make_train_step(
        model, objective, optimizer, config.optim.ema_decay, config.train.accumulate
    )

    def step_with_draws(state, batch, key, learning_rate):
        draws = draw(key, state.step, model, size, objective.steps)
        latents = latents_of(batch, draws, config.vae.scale)
        draws = draws._replace(posterior=None)
        batch = {"latents": latents, "labels": batch["labels"]}
        return train_step(state, batch, draws, learning_rate)

    whole = parallel.replicated(mesh)
    batch = batch_shapes(config, model, parallel.split_batch(mesh))
    key = jax.eval_shape(keys.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step_with_draws, donate_argnums=0, out_shardings=(shardings, whole))
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
    """`trace_step`'s, compiled without running it."""
    return trace_step(config, model, optimizer, state, mesh).lower().compile(compiler_options)
