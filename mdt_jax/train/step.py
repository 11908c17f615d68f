"""One training step: a full and a masked pass, one optimiser update, one EMA update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mdt_jax.diffusion.losses import diffusion_losses
from mdt_jax.diffusion.schedule import Schedule
from mdt_jax.models import masking
from mdt_jax.models.mdt import MDT
from mdt_jax.train.state import TrainState

LABEL_DROPOUT = 0.1


class Draws(NamedTuple):
    """All the randomness of one step. Both passes share t; the rest is each one's own."""

    t: jax.Array  # [B] int32, 0…T−1
    noise_full: jax.Array  # [B, H, W, C] float32, standard normal
    noise_masked: jax.Array
    drop_full: jax.Array  # [B] bool: replace the label by the null label
    drop_masked: jax.Array
    mask_noise: jax.Array  # [B, L] float32, uniform: the smallest are kept


def draw(key: jax.Array, step: jax.Array, model: MDT, batch: int, diffusion_steps: int) -> Draws:
    """The draws of `step`: a pure function of (key, step), the same on any number of devices."""
    keys = jax.random.split(jax.random.fold_in(key, step), 6)
    shape = (batch, *model.input_size, model.in_channels)
    return Draws(
        t=jax.random.randint(keys[0], (batch,), 0, diffusion_steps),
        noise_full=jax.random.normal(keys[1], shape),
        noise_masked=jax.random.normal(keys[2], shape),
        drop_full=jax.random.bernoulli(keys[3], LABEL_DROPOUT, (batch,)),
        drop_masked=jax.random.bernoulli(keys[4], LABEL_DROPOUT, (batch,)),
        mask_noise=jax.random.uniform(keys[5], (batch, model.num_tokens)),
    )


def _by_quartile(values: jax.Array, t: jax.Array, steps: int, name: str) -> dict[str, jax.Array]:
    """Means over the samples of each quarter of the timesteps; NaN where there is none."""
    quartile = t * 4 // steps
    return {
        f"{name}/q{q + 1}": jnp.where(quartile == q, values, 0).sum() / (quartile == q).sum()
        for q in range(4)
    }


def training_loss(
    model: MDT, schedule: Schedule, mask_ratio: float, params: dict, batch: dict, draws: Draws
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """mean(mse + vb) of the full pass plus the same of the masked pass; and its parts.

    batch: {"latents": [B, H, W, C] float32, "labels": [B] int32}. A pure function.
    """
    kept = masking.keep_length(model.num_tokens, mask_ratio)
    passes = {
        "full": (draws.noise_full, draws.drop_full, None),
        "masked": (
            draws.noise_masked,
            draws.drop_masked,
            masking.keep_ids(draws.mask_noise, kept),
        ),
    }
    metrics = {}
    for name, (noise, drop, keep_ids) in passes.items():
        labels = jnp.where(drop, model.num_classes, batch["labels"])

        def network(x, t, labels=labels, keep_ids=keep_ids):
            return model.apply({"params": params}, x, t, labels, keep_ids)

        losses = diffusion_losses(network, schedule, batch["latents"], draws.t, noise)
        metrics[f"loss/{name}"] = (losses["mse"] + losses["vb"]).mean()
        for part, values in losses.items():
            metrics[f"{part}/{name}"] = values.mean()
            metrics |= _by_quartile(values, draws.t, schedule.num_steps, f"{part}/{name}")
    loss = metrics["loss/full"] + metrics["loss/masked"]
    return loss, {"loss": loss, **metrics}


def make_train_step(
    model: MDT,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    mask_ratio: float,
    ema_decay: float,
) -> Callable[[TrainState, dict, Draws], tuple[TrainState, dict]]:
    """The function (state, batch, draws) → (state, metrics), to be jitted by the caller.

    A step whose loss or gradient norm is not finite leaves parameters, optimiser and EMA as they
    were and is counted.
    """

    def train_step(state: TrainState, batch: dict, draws: Draws) -> tuple[TrainState, dict]:
        def loss_fn(params):
            return training_loss(model, schedule, mask_ratio, params, batch, draws)

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def update(params, ema, opt_state):
            updates, opt_state = optimizer.update(grads, opt_state, params)
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
