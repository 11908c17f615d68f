"""What makes XLA run the network fast. None of it changes what the network computes.

The figures are ratios measured on a CPU; docs/performance.md has the tables they are taken from.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from mdt_jax.models import attend, fused, tpu_attention
from mdt_jax.models.attend import Transpose
from mdt_jax.models.gradients import with_backward

if TYPE_CHECKING:
    from mdt_jax.models.mdt import MDT

# On a CPU, stacks of at most this depth are unrolled: the program still compiles in seconds.
UNROLL_DEPTH = 12

# What a step derives from a parameter once, for all passes, has a name beside the parameter's and
# is used in its place.
CAST = "kernel_cast"  # see `with_casts`
BIAS = "position_bias"  # the bias of all pairs of tokens, [1, heads, L, L] float32
MODULATION = "values"  # of a block's Modulation, see `MDT.modulations`
DERIVED = {CAST: "kernel", BIAS: "relative_bias"}
BIAS_BYTES = 2**28  # more than this is looked up block by block
LINEAR_OUTPUT = "linear"  # the checkpoint name of each Linear layer's product, without the bias


def sum_rows(x: jax.Array) -> jax.Array:
    """The sum of x [N, D] over its rows, [D] float32."""
    return x.astype(jnp.float32).sum(0)


def sum_rows_by_matmul(x: jax.Array) -> jax.Array:
    """`sum_rows`, as a matmul: XLA's CPU back end is slow at sums of bfloat16.

    Gain: 0.74 of the time of a bfloat16 step, together with float32 sums in other gradients. On a
    GPU XLA would first copy x, padded and in float32. Test: tests/models/test_layers.py.
    """
    ones = jnp.ones(len(x), x.dtype)
    return jnp.dot(ones, x, precision="highest", preferred_element_type=jnp.float32)


class Ops(NamedTuple):
    """How the network's operations are computed.

    dtype: of matmuls; None: the input's. The others change the result by rounding only. transpose:
    of matrices for a matmul. sum_rows: x [N, D] → [D] float32. attend: see `attend.plain`, with a
    position bias of bias_dtype. recompute: compute elementwise work again in the backward pass and
    store fewer float32 arrays, for devices whose memory is slow beside their arithmetic.
    """

    dtype: jnp.dtype | None = None
    transpose: Transpose = jnp.matrix_transpose
    sum_rows: Callable[[jax.Array], jax.Array] = sum_rows
    attend: Callable[..., jax.Array] = attend.plain
    bias_dtype: jnp.dtype = jnp.float32
    recompute: bool = True


def for_devices(model: "MDT", platform: str, num_devices: int, mesh: Mesh | None = None) -> "MDT":
    """The same model with the fields `unroll`, `modulate_first` and `ops` that suit the devices.

    platform: "cpu", "gpu" or "tpu"; num_devices: how many devices run the program together, with
    batches split over their mesh; without a mesh TPUs take plain attention. On a CPU unrolled
    blocks take about 0.73 of the time of scanned ones (S/2, batch 16, float32).
    """
    if platform != "cpu":
        ops, fuse = Ops(), model.attention != "plain"
        if fuse and platform == "gpu" and not refusal(model, platform):
            ops = ops._replace(attend=fused.cudnn, bias_dtype=model.dtype)
        if fuse and platform == "tpu" and mesh is not None and _fits_tpu(model, mesh):
            ops = ops._replace(attend=tpu_attention.on_mesh(mesh))
        return model.clone(unroll=platform == "gpu", modulate_first=True, ops=ops)
    # With several CPU devices XLA would gather a split array to satisfy the layout constraint.
    transpose = row_major_transpose if num_devices == 1 else jnp.matrix_transpose
    ops = Ops(None, transpose, sum_rows_by_matmul, _plain(transpose), recompute=False)
    return model.clone(unroll=model.depth <= UNROLL_DEPTH, ops=ops)


@functools.cache  # since partials are equal only to themselves
def _plain(transpose: Transpose) -> Callable[..., jax.Array]:
    return functools.partial(attend.plain, transpose=transpose)


def _fits_tpu(model: "MDT", mesh: Mesh) -> bool:
    depth, kind = model.hidden_size // model.num_heads, mesh.devices.flat[0].device_kind
    return tpu_attention.fits(model.num_tokens, model.num_heads, depth, model.dtype, kind)


def refusal(model: "MDT", platform: str) -> str:
    """Why attention is plain on a GPU although cuDNN's was wanted; "" where it is not so."""
    if platform != "gpu" or model.attention == "plain":
        return ""
    depth = model.hidden_size // model.num_heads
    dtype = jnp.dtype(model.dtype).name
    why = fused.refusal(fused.cudnn, model.num_tokens, depth, dtype, model.relative_bias)
    return f"attention is plain XLA, since cuDNN does not take it: {why}" if why else ""


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


ATTENTION = ("auto", "plain")  # train.attention, see `for_devices`

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
    """The class of `count` blocks with stacked parameters, called as (x, c, kept, skip).

    XLA compiles a scanned block once, whatever the count. skip_axis: 0 if each block has its own
    skip [count, B, N, D], `nn.broadcast` if they share one. remat, gather, unroll: see `MDT`.
    """
    if gather is not None:
        block = nn.map_variables(block, "params", _gather_used(gather))
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
        in_axes=(shared, shared, skip_axis),  # pyright: ignore[reportArgumentType]
        unroll=count if unroll else 1,
    )


def with_casts(params: dict, dtype: jnp.dtype) -> dict:
    """Blocks' parameters, each kernel with its cast to dtype beside it under the name `CAST`.

    A step otherwise casts each kernel in every pass, and devices that share parameters gather them
    in float32. Only the cast's value is used; the gradient is the kernel's, in float32.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return params
    params = {
        name: with_casts(leaf, dtype) if isinstance(leaf, dict) else leaf
        for name, leaf in params.items()
    }
    if "kernel" in params:
        params[CAST] = jax.lax.stop_gradient(params["kernel"]).astype(dtype)
    return params


def _gather_used(gather: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """`gather` for the parameters whose values are used: not those that have a substitute."""

    def function(params):
        whole = {DERIVED[name] for name in params if name in DERIVED} | {BIAS}
        return {
            name: function(leaf) if isinstance(leaf, dict)
            else leaf if name in whole
            else gather(leaf)
            for name, leaf in params.items()
        }  # fmt: skip

    return function


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
