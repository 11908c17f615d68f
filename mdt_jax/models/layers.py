"""The layers of a transformer block: linear, norm, gated sum and GELU.

Elementwise work and sums over tokens are done in float32, also in the gradients below; the result
has the input's dtype. In bfloat16 such sums would be neither exact nor, on a CPU, fast.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mdt_jax.models.gradients import with_backward
from mdt_jax.models.xla import LINEAR_OUTPUT

Transpose = Callable[[jax.Array], jax.Array]


class Linear(nn.Module):
    """A Dense layer over the last axis, computed as one 2-D matmul; Xavier-uniform weights.

    Tokens are flattened first: XLA's CPU back end contracts a weight gradient over one flattened
    axis about twice as fast as over [batch, tokens]. transpose: see `affine`.
    """

    features: int
    dtype: jnp.dtype | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    transpose: Transpose = jnp.matrix_transpose

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype or x.dtype)
        out = affine(flat, kernel, bias, self.transpose)
        return checkpoint_name(out, LINEAR_OUTPUT).reshape(*x.shape[:-1], self.features)


def affine(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, transpose: Transpose = jnp.matrix_transpose
) -> jax.Array:
    """x [N, D]·kernel [D, E] + bias [E], in x's dtype; kernel and bias are float32.

    transpose: the function that transposes matrices in the backward pass.
    """
    return _affine(transpose)(x, kernel, bias)


@functools.cache
def _affine(transpose: Transpose):
    backward = functools.partial(_affine_backward, transpose)
    return with_backward(_affine_forward, _affine_tangent, backward)


def _affine_forward(x, kernel, bias):
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype), (x, kernel)


def _affine_tangent(saved, dx, d_kernel, d_bias):
    x, kernel = saved
    return dx @ kernel.astype(x.dtype) + x @ d_kernel.astype(x.dtype) + d_bias.astype(x.dtype)


def _affine_backward(transpose, saved, grad):
    x, kernel = saved
    ones = jnp.ones(len(grad), grad.dtype)  # since XLA's CPU back end is slow at sums of bfloat16
    return (
        grad @ transpose(kernel.astype(x.dtype)),
        jnp.dot(transpose(x), grad, preferred_element_type=kernel.dtype),
        jnp.dot(ones, grad, precision="highest", preferred_element_type=kernel.dtype),
    )


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm (Ba et al. 2016) over the last axis, without parameters, eps 1e-6; float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm(x)·(1 + scale) + shift; x: [B, N, D]; shift, scale: [B, 1, D]."""
    shift, scale = (each.astype(jnp.float32) for each in (shift, scale))
    return (layer_norm(x) * (1 + scale) + shift).astype(x.dtype)


def add_gated(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """x + gate·y; x, y: [B, N, D]; gate: [B, 1, D]."""
    x32, gate, y = (each.astype(jnp.float32) for each in (x, gate, y))
    return (x32 + gate * y).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return _gelu(x)


_SQRT, _CUBE = (2 / jnp.pi) ** 0.5, 0.044715


def _gelu_forward(x):
    x32 = x.astype(jnp.float32)
    tanh = jnp.tanh(_SQRT * (x32 + _CUBE * x32**3))
    return (0.5 * x32 * (1 + tanh)).astype(x.dtype), x


def _gelu_tangent(x, dx):
    x32 = x.astype(jnp.float32)
    tanh = jnp.tanh(_SQRT * (x32 + _CUBE * x32**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x32 * (1 - tanh * tanh) * _SQRT * (1 + 3 * _CUBE * x32 * x32)
    return (dx.astype(jnp.float32) * slope).astype(x.dtype)


# The derivative is elementwise, so that its transpose is itself.
_gelu = with_backward(_gelu_forward, _gelu_tangent, lambda x, grad: (_gelu_tangent(x, grad),))
