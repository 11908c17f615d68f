"""Attention with a bias that all samples share, in plain XLA: what every fused form is held to."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.gradients import with_backward

Transpose = Callable[[jax.Array], jax.Array]

# The logit of a hidden key, far below every other.
MASKED_OUT = float(-0.7 * np.finfo(np.float32).max)


def plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    visible: jax.Array | None = None,
    transpose: Transpose = jnp.matrix_transpose,
) -> jax.Array:
    """softmax(q·kᵀ / √d + bias)·v (Vaswani et al. 2017); the softmax is float32.

    q, k, v: [B, N, heads, d]. bias: [1, heads, N, N] float32, one for all samples. visible: [B, N]
    bool, the keys that are attended to; None: all. transpose: the function that transposes
    matrices. Returns [B, N, heads, d] in v's dtype.
    """
    q, k, v = (jnp.swapaxes(each, 1, 2) for each in (q, k, v))
    return jnp.swapaxes(_attend(transpose)(q, k, v, bias, visible), 1, 2)


@functools.cache
def _attend(transpose: Transpose):
    forward = functools.partial(_attend_forward, transpose)
    backward = functools.partial(_attend_backward, transpose)
    return with_backward(forward, _attend_tangent, backward, inputs=4)


def _attend_forward(transpose, q, k, v, bias, visible):
    logits = jnp.matmul(q, transpose(k), preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = jnp.where(visible[:, None, None], logits, MASKED_OUT)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return weights @ v, (q, k, v, bias, weights)


def _attend_tangent(saved, dq, dk, dv, d_bias):
    q, k, v, _, weights = saved
    from_q, from_k = (
        jnp.matmul(a, b.mT, preferred_element_type=jnp.float32) for a, b in ((dq, k), (q, dk))
    )
    d_logits = (from_q + from_k) * q.shape[-1] ** -0.5
    if d_bias is not None:
        d_logits = d_logits + d_bias
    w32 = weights.astype(jnp.float32)
    d_weights = w32 * (d_logits - (w32 * d_logits).sum(-1, keepdims=True))
    return d_weights.astype(v.dtype) @ v + weights @ dv


def _attend_backward(transpose, saved, grad):
    q, k, v, bias, weights = saved
    d_weights = jnp.matmul(grad, transpose(v), preferred_element_type=jnp.float32)
    w32 = weights.astype(jnp.float32)
    # 0 for hidden keys, whose weights are 0
    d_logits = w32 * (d_weights - (w32 * d_weights).sum(-1, keepdims=True))
    d_scaled = (d_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    d_bias = None if bias is None else d_logits.sum(0, keepdims=True)
    return d_scaled @ k, transpose(d_scaled) @ q, transpose(weights) @ grad, d_bias
