"""Optimisers, as Optax transformations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax.runtime import parallel


class AdanState(NamedTuple):
    """count: updates; m, v, n: moving averages (see `scale_by_adan`); last: the last gradient."""

    count: jax.typing.ArrayLike
    m: optax.Updates
    v: optax.Updates
    n: optax.Updates
    last: optax.Updates


def scale_by_adan(
    b1: float = 0.98, b2: float = 0.92, b3: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adan (Xie et al. 2022, arXiv 2208.06677) with the decay rates of its published code.

    Let d be the gradient g minus the previous one (0 at the first step), and m, v and n the
    bias-corrected moving averages of g, d and (g + b2·d)². The update is (m + b2·v) / (√n + eps).
    `optax.scale_by_adan` weights d by 1 − b2 instead, in both places.
    """

    def init(params):
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(4)]
        return AdanState(jnp.zeros((), jnp.int32), *zeros)

    def update(updates, state, params=None):
        del params
        grads = updates  # Optax passes gradients under this name
        first = state.count == 0
        count = optax.safe_increment(state.count)
        diff = jax.tree.map(lambda g, last: jnp.where(first, 0, g - last), grads, state.last)
        ahead = jax.tree.map(lambda g, d: g + b2 * d, grads, diff)
        m = optax.tree.update_moment(grads, state.m, b1, 1)
        v = optax.tree.update_moment(diff, state.v, b2, 1)
        n = optax.tree.update_moment(ahead, state.n, b3, 2)
        unbiased = [
            optax.tree.bias_correction(moment, decay, count)
            for moment, decay in ((m, b1), (v, b2), (n, b3))
        ]
        updates = jax.tree.map(lambda m, v, n: (m + b2 * v) / (jnp.sqrt(n) + eps), *unbiased)
        return updates, AdanState(count, m, v, n, grads)

    return optax.GradientTransformation(init, update)


def make_optimizer(optim: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of a config's `optim` fields, for a learning rate of 1.

    The training step multiplies the updates by the learning rate.

    adamw: betas (0.9, 0.999), eps 1e-8, as published for MDT. adan: betas (0.98, 0.92, 0.99), eps
    1e-8, as published for MDTv2. optim.b1 and optim.b2 replace the first two unless they are −1.
    optim.clip_norm > 0 first clips the gradient's global norm. optim.weight_decay is decoupled:
    see `descend`.
    """
    betas = {name: optim[name] for name in ("b1", "b2") if optim[name] >= 0}
    # The state is the same with and without clipping or decay, so that a resumed run may change
    # them; `identity` stands where the states of earlier versions had another transformation.
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm > 0 else optax.identity()
    descent = descend(optim.weight_decay)
    if optim.name == "adan":
        optimizer = optax.chain(scale_by_adan(**betas), descent)
    elif optim.name == "adamw":
        optimizer = optax.chain(optax.scale_by_adam(**betas), optax.identity(), descent)
    else:
        raise ValueError(f"unknown optimizer {optim.name!r}")
    return optax.chain(clip, optimizer)


def descend(weight_decay: float) -> optax.GradientTransformation:
    """−(update + weight_decay·parameter) for the kernels of linear layers, −update for the rest.

    Decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101). Biases, embeddings, the
    mask token and the tables of the relative position bias do not decay.
    """

    def step(updates, params):
        def of_leaf(path, update, parameter):
            decays = weight_decay and path[-1].key == "kernel"
            return -(update + weight_decay * parameter) if decays else -update

        return jax.tree.map_with_path(of_leaf, updates, params)

    return optax.stateless(step)


def rate_schedule(optim: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run, as a factor of optim.lr: steps taken → factor.

    The rate rises linearly from 0, of the first step, over optim.warmup_steps. It then stays at
    optim.lr (constant) or falls, linearly or along half a cosine, to optim.end_lr after `steps`.
    """
    warmup, end = optim.warmup_steps, optim.end_lr / optim.lr
    if optim.schedule == "constant":
        falling = optax.constant_schedule(1.0)
    elif optim.schedule == "linear":
        falling = optax.linear_schedule(1.0, end, steps - warmup)
    else:
        falling = optax.cosine_decay_schedule(1.0, steps - warmup, alpha=end)
    if not warmup:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), falling], [warmup])


def ema_schedule(optim: ConfigDict) -> optax.ScalarOrSchedule:
    """The decay of the parameters' average: optim.ema_decay, or a function of the steps taken.

    With optim.ema_warmup it is at most (1 + step) / (10 + step), as in TensorFlow's
    ExponentialMovingAverage: the average covers about the last ninth of the steps so far, and
    forgets the initial parameters.
    """
    if not optim.ema_warmup:
        return optim.ema_decay
    return lambda step: jnp.minimum(optim.ema_decay, (1.0 + step) / (10.0 + step))


def learning_rate(optim: ConfigDict, mesh: Mesh) -> jax.Array:
    """optim.lr as float32, on every device of a mesh: an input of the step, not a constant."""
    return parallel.put(np.float32(optim.lr), parallel.replicated(mesh))
