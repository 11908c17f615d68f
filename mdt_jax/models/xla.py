"""What makes XLA run the network fast. None of it changes what the network computes.

The figures are ratios measured on a CPU; docs/performance.md has the tables they are taken from.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from mdt_jax.models.gradients import with_backward

if TYPE_CHECKING:
    from mdt_jax.models.mdt import MDT

# On a CPU, stacks of at most this depth are unrolled: the program still compiles in seconds.
UNROLL_DEPTH = 12

LINEAR_OUTPUT = "linear"  # the checkpoint name of what each Linear layer returns


def for_devices(model: "MDT", platform: str, num_devices: int) -> "MDT":
    """The same model with the fields `unroll` and `transpose` that suit the devices.

    platform: "cpu", "gpu" or "tpu"; num_devices: how many devices run the program together.
    On a CPU unrolled blocks take about 0.73 of the time of scanned ones (S/2, batch 16, float32).
    """
    cpu = platform == "cpu"
    # With several CPU devices XLA would gather a split array to satisfy the layout constraint.
    row_major = cpu and num_devices == 1
    return model.clone(
        unroll=cpu and model.depth <= UNROLL_DEPTH,
        transpose=row_major_transpose if row_major else jnp.matrix_transpose,
    )


def row_major_transpose(x: jax.Array) -> jax.Array:
    """x.mT of [..., D, N], copied into row-major order where a CPU then multiplies faster.

    XLA otherwise transposes while it multiplies. Its CPU matmuls use the matrix units (AMX) for two
    row-major bfloat16 matrices only, and it calls one matmul after the other for a batch of small
    matrices. Gain: 0.65 of the time of a bfloat16 step; 60 → 5 ms of batched matmuls in a step of
    the digits recipe. Test: tests/models/test_xla.py.
    """
    small = x.ndim > 2 and max(x.shape[-2:]) <= 64
    if x.dtype != jnp.bfloat16 and not small:
        return x.mT
    return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))


def gradient_barrier(x: jax.Array) -> jax.Array:
    """x itself, whose gradient is stored as one array.

    In unrolled blocks XLA otherwise recomputes the sum along the residual stream inside each block,
    from the gradients of all later blocks (up to 49 arrays). Gain: 610 → 420 ms of elementwise
    work in a float32 step of S/2, batch 8. Test: tests/models/test_layers.py.
    """
    return _gradient_barrier(x)


_gradient_barrier = with_backward(
    lambda x: (x, None), lambda _, dx: dx, lambda _, grad: (jax.lax.optimization_barrier(grad),)
)


def regather_in_backward(primitive, *_, **__) -> bool:
    """A remat policy that saves everything but a block's gathered and cast parameters.

    Where devices share parameters, JAX otherwise keeps the gathered copies of all blocks until the
    backward pass, so that each device holds the whole network. Test: tests/models/test_xla.py.
    """
    return primitive.name not in ("sharding_constraint", "convert_element_type")


# train.remat → which of a block's intermediate values are saved for the backward pass. It
# recomputes the others from the block's input. "dots" recomputes attention and elementwise work.
REMAT = {
    "none": regather_in_backward,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack_blocks(
    block: type[nn.Module],
    count: int,
    skip_axis: object,
    remat: str,
    gather: Callable[[dict], dict] | None,
    unroll: bool,
) -> Callable[..., nn.Module]:
    """The class of `count` blocks with stacked parameters, called as (x, c, positions, mask, skip).

    XLA compiles a scanned block once, whatever the count. skip_axis: 0 if each block has its own
    skip [count, B, N, D], `nn.broadcast` if they share one. remat, gather, unroll: see `MDT`.
    """
    if gather is not None:
        block = nn.map_variables(block, "params", gather)
    if remat != "none" or gather is not None:
        # Unrolled, XLA would find that the recomputed values exist already, and keep them.
        block = nn.remat(block, prevent_cse=unroll, policy=REMAT[remat])
    shared = nn.broadcast
    return nn.scan(
        block,
        length=count,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        # Flax takes a tuple of axes, but annotates an int.
        in_axes=(shared, shared, shared, skip_axis),  # pyright: ignore[reportArgumentType]
        unroll=count if unroll else 1,
    )


def unstack_blocks(params: dict, stacks: Sequence[str]) -> Callable[[], dict]:
    """Split the parameters `stacks` by block; the function that is returned stacks them again.

    Call this outside the sampling loop, and the returned function inside it. XLA cancels stacking
    against slicing, so that the loop reads each block's parameters directly; otherwise it slices
    them out of their stack at every step. Gain: sampling in float32 0.89 → 0.81 of PyTorch's time,
    together with the gradient of attention. Test: tests/sampling/test_generation.py.
    """
    leaves, tree = jax.tree.flatten({name: params[name] for name in stacks if name in params})
    by_block = [list(leaf) for leaf in leaves]
    return lambda: params | jax.tree.unflatten(tree, [jnp.stack(leaf) for leaf in by_block])
