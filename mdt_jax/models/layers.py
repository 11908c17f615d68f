"""The linear layer all networks share, and what stands between those of a block.

Elementwise work is done in float32 and given on in the input's dtype, whose sums over tokens would
be neither exact nor fast in bfloat16: the gradients below are written so that none is taken there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from mdt_jax.models.gradients import with_backward

LINEAR = "linear"


class Linear(nn.Module):
    """A Dense over the last axis that runs as one 2-D matmul, with Xavier-uniform weights.

    Tokens are flattened first: XLA's CPU back end contracts a weight gradient over one flattened
    axis about twice as fast as over [batch, tokens].
    """

    features: int
    dtype: jnp.dtype | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype or x.dtype)
        out = checkpoint_name(affine(flat, kernel, bias), LINEAR)  # which a remat policy may keep
        return out.reshape(*x.shape[:-1], self.features)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x [N, D]·kernel [D, E] + bias [E], in x's dtype; parameters are float32."""
    return _affine(x, kernel, bias)


def _affine_forward(x, kernel, bias):
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype), (x, kernel)


def _affine_tangent(kept, dx, d_kernel, d_bias):
    x, kernel = kept
    return dx @ kernel.astype(x.dtype) + x @ d_kernel.astype(x.dtype) + d_bias.astype(x.dtype)


def _affine_backward(kept, grad):
    x, kernel = kept
    ones = jnp.ones(len(grad), grad.dtype)  # since XLA's CPU back end is slow at sums of bfloat16
    return (
        grad @ transposed(kernel.astype(x.dtype)),
        jnp.dot(transposed(x), grad, preferred_element_type=kernel.dtype),
        jnp.dot(ones, grad, precision="highest", preferred_element_type=kernel.dtype),
    )


_affine = with_backward(_affine_forward, _affine_tangent, _affine_backward)


def transposed(x: jax.Array) -> jax.Array:
    """x.mT [..., D, N] for a matmul.

    On a CPU it is laid out anew in bfloat16: only matmuls of two row-major matrices use its matrix
    units, which are three to five times as fast. And where many small ones are multiplied, which
    XLA would else do by a call for each. Not where a CPU passes for several devices, since XLA
    would bring together what they share.
    """
    small = x.ndim > 2 and max(x.shape[-2:]) <= 64
    if not (x.dtype == jnp.bfloat16 or small) or jax.device_count() > 1:
        return x.mT

    def laid_out(x):
        return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, cpu=laid_out, default=jnp.matrix_transpose)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without affine parameters over the last axis, eps 1e-6; float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x: [B, N, D]; shift, scale: [B, 1, D] → LayerNorm of x, scaled by 1 + scale and shifted."""
    shift, scale = (each.astype(jnp.float32) for each in (shift, scale))
    return (layer_norm(x) * (1 + scale) + shift).astype(x.dtype)


def add_gated(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """x + gate·y; x, y: [B, N, D], gate: [B, 1, D]."""
    x32, gate, y = (each.astype(jnp.float32) for each in (x, gate, y))
    return (x32 + gate * y).astype(x.dtype)


def gradient_barrier(x: jax.Array) -> jax.Array:
    """x, whose gradient is one array before it goes on.

    In blocks that are laid out one by one XLA would fuse the sum along the residual stream into
    each block anew, from the gradients of all blocks behind it.
    """
    return _summed(x)


_summed = with_backward(
    lambda x: (x, None), lambda _, dx: dx, lambda _, grad: (jax.lax.optimization_barrier(grad),)
)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return _gelu(x)


def _gelu_forward(x):
    x32 = x.astype(jnp.float32)
    tanh = jnp.tanh(_SQRT * (x32 + _CUBE * x32**3))
    return (0.5 * x32 * (1 + tanh)).astype(x.dtype), x


def _gelu_tangent(x, dx):
    x32 = x.astype(jnp.float32)
    tanh = jnp.tanh(_SQRT * (x32 + _CUBE * x32**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x32 * (1 - tanh * tanh) * _SQRT * (1 + 3 * _CUBE * x32 * x32)
    return (dx.astype(jnp.float32) * slope).astype(x.dtype)


_SQRT, _CUBE = (2 / jnp.pi) ** 0.5, 0.044715
# Elementwise, so that forward and backward are the same.
_gelu = with_backward(_gelu_forward, _gelu_tangent, lambda x, grad: (_gelu_tangent(x, grad),))
