"""The state that a training step updates."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime import keys, parallel


@flax.struct.dataclass
class TrainState:
    """Parameters, their EMA, the optimiser's state and counters ([] int32).

    step: steps taken; skipped: non-finite steps among them; skipped_in_row: those since the last
    finite step.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_row: jax.Array


def state_from_params(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0; the EMA starts as a copy of the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def init_state(model: MDT, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state at step 0 with initial parameters drawn from `key`."""
    return state_from_params(init_params(model, key), optimizer)


def abstract_state(model: MDT, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of a state on a mesh, as ShapeDtypeStructs."""
    shapes = jax.eval_shape(lambda key: init_state(model, optimizer, key), keys.key(0))

    def with_sharding(leaf):
        sharding = parallel.sharded(mesh, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, shapes)


def run_keys(seed: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """(key of all training steps, key of initialisation) of a seed, on every device of a mesh."""
    purposes = (keys.Purpose.TRAINING, keys.Purpose.INIT)

    def make():
        return tuple(keys.of(seed, purpose) for purpose in purposes)

    return jax.jit(make, out_shardings=parallel.replicated(mesh))()


def initial_state(
    model: MDT,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    abstract: TrainState,
    weights: dict | None = None,
) -> TrainState:
    """The state at step 0, with the shardings of `abstract`.

    weights: {"params", "ema"} that replace the freshly initialised ones.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(init_state, static_argnums=(0, 1), out_shardings=shardings)
    state = init(model, optimizer, key)
    if weights is None:
        return state
    targets = {"params": shardings.params, "ema": shardings.ema}
    return state.replace(**jax.tree.map(parallel.put, weights, targets))
