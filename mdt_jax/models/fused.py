"""Fused attention: the logits never reach the device's memory."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

HIDDEN = -3e4  # of a hidden key, in the channel that hides it; its logit is this / √d


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    visible: jax.Array | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """As `attend.plain`, by cuDNN; the bias is rounded to q's dtype.

    A mask would become a bias for each sample. So one more channel hides keys: it is 1 in queries,
    and 0 in visible keys or `HIDDEN`. implementation: "xla" computes the same in plain XLA.
    """
    length, depth = q.shape[1], q.shape[3]
    if length % 2:  # cuDNN has gradients of a bias for even lengths only
        pad = [(0, 0), (0, 1), (0, 0), (0, 0)]
        q, k, v = (jnp.pad(each, pad) for each in (q, k, v))
        bias = None if bias is None else jnp.pad(bias, [(0, 0), (0, 0), (0, 1), (0, 1)])
        if visible is None:
            visible = jnp.ones((len(q), length), bool)
        visible = jnp.pad(visible, [(0, 0), (0, 1)])
    if visible is not None:
        hidden = jnp.where(visible, 0, HIDDEN).astype(k.dtype)[:, :, None, None]
        shape = (*q.shape[:3], 1)
        q = jnp.concatenate([q, jnp.ones(shape, q.dtype)], -1)
        k = jnp.concatenate([k, jnp.broadcast_to(hidden, shape)], -1)
    channels = -(-q.shape[-1] // 8) * 8  # cuDNN takes multiples of 8
    q, k, v = (jnp.pad(each, [*[(0, 0)] * 3, (0, channels - each.shape[-1])]) for each in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v,
        None if bias is None else bias.astype(q.dtype),
        scale=depth**-0.5,
        implementation=implementation,
    )  # fmt: skip
    return out[:, :length, :, :depth]


@functools.cache
def refusal(attend: Callable, length: int, depth: int, dtype: str, bias: bool) -> str:
    """Why a fused form cannot be used for training, or "" if it can.

    length: number of tokens; depth: channels of a head; bias: whether there is one. The form's own
    checks decide, among them those of the device and of cuDNN.
    """
    x = jax.ShapeDtypeStruct((1, length, 1, depth), dtype)
    shared = jax.ShapeDtypeStruct((1, 1, length, length), jnp.float32) if bias else None
    visible = jax.ShapeDtypeStruct((1, length), bool)

    def loss(q, k, v, bias, visible):
        return attend(q, k, v, bias, visible).astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(loss), x, x, x, shared, visible)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).strip().split("\n")[0]
    return ""
