"""Attention with a shared bias as one Pallas kernel for TPUs, and its gradient as another.

Plain attention writes the logits [B, heads, N, N] to memory and reads them again several times.
Here those of one head stay in the TPU's vector memory (VMEM), and the backward pass computes them
anew. The heads of a token lie side by side, as Linear layers have them, so that nothing is
transposed or padded in memory. The grid is (group of heads, sample), the samples innermost: the
bias of a group is read once, and its gradient is summed over the samples before it is written.
The kernels compute the logits as [keys, queries]: a TPU sums fastest over the first axis, and only
[N, d] matrices are transposed.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from mdt_jax.models.gradients import with_backward

LANES = 128  # the width of a TPU's vectors, of which a block is a multiple
SMALL_VMEM = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB; later TPUs have 64 MiB or more
XLA_VMEM = 2**24  # bytes: XLA's limit for a kernel that sets none
HIDDEN = float(-0.7 * np.finfo(np.float32).max)  # the bias of a hidden key, far below every logit


def tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    kept: jax.Array | None = None,
) -> jax.Array:
    """softmax(q·kᵀ / √d + bias)·v over the kept keys; the softmax is float32.

    q, k, v: [B, N, heads, d], bfloat16 or float32; bias: [1, heads, N, N] float32, shared by all
    samples, or None; kept: [B, N] bool, at least one key of each sample, or None for all keys.
    Returns [B, N, heads, d] in v's dtype. Products of float32 have JAX's precision "highest".
    """
    batch, length, heads, size = q.shape
    if bias is None:
        bias = jnp.zeros((1, heads, length, length))
    hidden = jnp.zeros((batch, length)) if kept is None else jnp.where(kept, 0.0, HIDDEN)
    q, k, v = (each.reshape(batch, length, heads * size) for each in (q, k, v))
    return _attend(q, k, v, bias[0].mT, hidden[:, None]).reshape(batch, length, heads, size)


@functools.cache  # so that equal meshes get the same function, and programs are equal
def on_mesh(mesh: Mesh) -> Callable[..., jax.Array]:
    """`tpu` for arrays whose batch is split over all axes of a mesh.

    XLA cannot split a Pallas kernel. Here each device runs the kernels on its own samples, and the
    gradient of the bias is summed over the devices.
    """
    if mesh.size == 1:
        return tpu
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def attend(q, k, v, bias, kept=None):
        specs = (split, split, split, whole, split)
        shards = jax.shard_map(tpu, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        return shards(q, k, v, bias, kept)

    return attend


def fits(length: int, heads: int, head_size: int, dtype: DTypeLike, device_kind: str) -> bool:
    """Whether the kernels for q, k and v of these sizes and `dtype` fit the VMEM of a kind of TPU.

    device_kind: JAX's name of it, for example "TPU v5 lite".
    """
    small = device_kind.startswith(SMALL_VMEM)
    needed = _vmem(length, heads, head_size, jnp.dtype(dtype).itemsize)
    return needed <= (14 if small else 60) * 2**20


def _group(heads: int, size: int) -> int:
    """The fewest heads of `size` that fill whole vectors; all heads if no number of them does."""
    counts = (n for n in range(1, heads) if heads % n == 0 and n * size % LANES == 0)
    return next(counts, heads)


def _vmem(length: int, heads: int, size: int, itemsize: int) -> int:
    """An upper bound of the bytes of VMEM that the backward pass takes.

    Blocks have two buffers each, but the bias and its gradient only one if there is one group of
    heads. The compiler keeps up to `itemsize` arrays [N, N] for each head of a group.
    """
    group = _group(heads, size)
    rows, lanes = math.ceil(length / 16) * 16, math.ceil(length / LANES) * LANES
    tokens = rows * math.ceil(group * size / LANES) * LANES * itemsize
    pairs = group * rows * lanes * 4
    return 2 * 7 * tokens + (2 if group == heads else 4) * pairs + itemsize * pairs


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product of two matrices over an axis of each, in float32."""
    return jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())),
        precision="highest" if x.dtype == jnp.float32 else "default",
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _exponentials(q, k, bias, hidden):
    """The softmax's numerators [keys, queries] and the inverses [1, queries] of its denominators.

    float32; q, k: [N, d]; bias: [keys, queries]; hidden: [1, keys].
    """
    logits = _dot(k, q, 1, 1) * q.shape[-1] ** -0.5 + bias + hidden.T
    exponentials = jnp.exp(logits - logits.max(0, keepdims=True))
    return exponentials, 1 / exponentials.sum(0, keepdims=True)


def _heads(size: int, *refs) -> list[tuple[jax.Array, ...]]:
    """Blocks [1, N, heads · d] as one tuple of arrays [N, d] for each head."""
    blocks = [ref[0] for ref in refs]
    starts = range(0, blocks[0].shape[1], size)
    return [tuple(block[:, start : start + size] for block in blocks) for start in starts]


def _forward_kernel(size, q_ref, k_ref, v_ref, bias_ref, hidden_ref, out_ref):
    outs = []
    for head, (q, k, v) in enumerate(_heads(size, q_ref, k_ref, v_ref)):
        exponentials, inverse = _exponentials(q, k, bias_ref[head], hidden_ref[0])
        out = _dot(v, exponentials.astype(v.dtype), 0, 0) * inverse
        outs.append(out.T.astype(v.dtype))
    out_ref[0] = jnp.concatenate(outs, -1)


def _backward_kernel(size, q_ref, k_ref, v_ref, bias_ref, hidden_ref, grad_ref, *out_refs):
    *token_refs, d_bias_ref = out_refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

    grads = []
    for head, (q, k, v, grad) in enumerate(_heads(size, q_ref, k_ref, v_ref, grad_ref)):
        exponentials, inverse = _exponentials(q, k, bias_ref[head], hidden_ref[0])
        weights = exponentials * inverse
        d_weights = _dot(v, grad, 1, 1)
        d_logits = weights * (d_weights - (weights * d_weights).sum(0, keepdims=True))
        d_bias_ref[head] += d_logits
        d_scaled = (d_logits * size**-0.5).astype(q.dtype)
        d_q, d_k = _dot(k, d_scaled, 0, 0).T, _dot(d_scaled, q, 1, 0)
        d_v = _dot(weights.astype(v.dtype), grad, 1, 0)
        grads.append([each.astype(q.dtype) for each in (d_q, d_k, d_v)])
    for ref, heads in zip(token_refs, zip(*grads, strict=True), strict=True):
        ref[0] = jnp.concatenate(heads, -1)


def _call(kernel: Callable, products: int, operands: list, results: list) -> list[jax.Array]:
    """Run kernel(head size, *blocks) on pairs of an array, or of a result's shape, and its block.

    products: how many [N, N]·[N, d] products of matrices there are for each head.
    """
    arrays, in_specs = zip(*operands, strict=True)
    shapes, out_specs = zip(*results, strict=True)
    batch, length, dim = arrays[0].shape
    heads = len(arrays[3])
    size = dim // heads
    pairs = batch * heads * length**2
    cost = pl.CostEstimate(
        flops=2 * products * pairs * size,
        transcendentals=pairs,
        bytes_accessed=sum(each.size * each.dtype.itemsize for each in (*arrays, *shapes)),
    )
    call = pl.pallas_call(
        functools.partial(kernel, size),
        grid=(heads // _group(heads, size), batch),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(XLA_VMEM, _vmem(length, heads, size, arrays[0].dtype.itemsize)),
        ),
        cost_estimate=cost,
    )
    return call(*arrays)


def _operands(q, k, v, bias, hidden):
    """Each array with its block.

    q, k, v: [B, N, heads · d]; bias: [heads, keys, queries] float32; hidden: [B, 1, keys] float32.
    """
    length, heads = q.shape[1], len(bias)
    group = _group(heads, q.shape[2] // heads)
    tokens = pl.BlockSpec((1, length, q.shape[2] // heads * group), lambda h, b: (b, 0, h))
    pairs = pl.BlockSpec((group, length, length), lambda h, b: (h, 0, 0))
    row = pl.BlockSpec((1, 1, length), lambda h, b: (b, 0, 0))
    return [(q, tokens), (k, tokens), (v, tokens), (bias, pairs), (hidden, row)]


def _forward(*arrays):
    operands = _operands(*arrays)
    (out,) = _call(_forward_kernel, 2, operands, [operands[2]])
    return out, arrays


def _backward(arrays, grad):
    operands = _operands(*arrays)
    _, tokens = operands[0]
    return tuple(_call(_backward_kernel, 5, [*operands, (grad, tokens)], operands[:4]))


def _tangent(arrays, *tangents):
    return jax.jvp(functools.partial(_plain, hidden=arrays[4]), arrays[:4], tangents)[1]


def _plain(q, k, v, bias, hidden):
    """What the forward kernel computes, by XLA and all of it in float32."""
    dtype, shape = v.dtype, q.shape
    q, k, v = (each.astype(jnp.float32).reshape(*shape[:2], len(bias), -1) for each in (q, k, v))
    product = functools.partial(jnp.einsum, precision="highest")
    logits = product("bjhd,bihd->bhji", k, q) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits + bias + hidden.mT[:, None], axis=-2)
    return product("bhji,bjhd->bihd", weights, v).astype(dtype).reshape(shape)


_attend = with_backward(_forward, _tangent, _backward, inputs=4)
