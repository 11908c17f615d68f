"""The layers of a transformer block: linear, norm, gated sum and GELU.

Elementwise work and sums over tokens are done in float32, also in the gradients below; the result
has the input's dtype. In bfloat16 such sums would be neither exact nor, on a CPU, fast.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mdt_jax.models.gradients import with_backward
from mdt_jax.models.xla import CAST, LINEAR_OUTPUT, Ops


class Linear(nn.Module):
    """A Dense layer over the last axis, computed as one 2-D matmul; Xavier-uniform weights.

    Tokens are flattened first: XLA's CPU back end contracts a weight gradient over one flattened
    axis about twice as fast as over [batch, tokens].
    """

    features: int
    ops: Ops = Ops()
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        flat = x.reshape(-1, x.shape[-1]).astype(self.ops.dtype or x.dtype)
        out = affine(flat, kernel, bias, self.get_variable("params", CAST), self.ops)
        return out.reshape(*x.shape[:-1], self.features)


def affine(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    cast: jax.Array | None = None,
    ops: Ops = Ops(),  # noqa: B008
) -> jax.Array:
    """x [N, D]·kernel [D, E] + bias [E], in x's dtype; kernel and bias are float32.

    cast: the kernel in x's dtype, where it has been cast already. The gradient is the kernel's.
    """
    return _affine(ops)(x, kernel, bias, kernel.astype(x.dtype) if cast is None else cast)


@functools.cache
def _affine(ops: Ops):
    backward = functools.partial(_affine_backward, ops)
    return with_backward(functools.partial(_affine_forward, ops), _affine_tangent, backward, 3)


def _affine_forward(ops, x, kernel, bias, cast):
    # Saved without the bias, whose sum then is part of the kernels that read it.
    product = checkpoint_name(x @ cast, LINEAR_OUTPUT)
    if ops.recompute:  # a sum in float32 needs no kernel that casts the bias
        return (product.astype(jnp.float32) + bias).astype(x.dtype), (x, cast)
    return product + bias.astype(x.dtype), (x, cast)


def _affine_tangent(saved, dx, d_kernel, d_bias):
    x, cast = saved
    return dx @ cast + x @ d_kernel.astype(x.dtype) + d_bias.astype(x.dtype)


def _affine_backward(ops, saved, grad):
    x, cast = saved
    d_kernel = jnp.dot(ops.transpose(x), grad, preferred_element_type=jnp.float32)
    return grad @ ops.transpose(cast), d_kernel, ops.sum_rows(grad)


EPS = 1e-6  # of LayerNorm (Ba et al. 2016), here without parameters


def modulated_norm(
    x: jax.Array,
    shift: jax.Array,
    scale: jax.Array,
    ops: Ops = Ops(),  # noqa: B008
    eps: float = EPS,
) -> jax.Array:
    """LayerNorm(x)·(1 + scale) + shift; x: [B, N, D]; shift, scale: [B, 1, D].

    With ops.recompute the backward pass keeps x and two numbers for each token; JAX's own keeps a
    float32 array of x's shape.
    """
    if ops.recompute:
        return _modulated_norm(eps)(x, shift, scale)
    return _norm_forward(eps, x, shift, scale)[0]


def _standardized(x, mean, inverse):
    return (x.astype(jnp.float32) - mean) * inverse


def _norm_forward(eps, x, shift, scale):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    shift, factor = shift.astype(jnp.float32), 1 + scale.astype(jnp.float32)
    out = centred * inverse * factor + shift
    return out.astype(x.dtype), (x, mean, inverse, scale)


def _norm_slope(h, inverse, grad):
    """The derivative of the standardised h, applied to grad. It is symmetric."""
    mean, along = grad.mean(-1, keepdims=True), (grad * h).mean(-1, keepdims=True)
    return inverse * (grad - mean - h * along)


def _norm_tangent(saved, dx, d_shift, d_scale):
    x, mean, inverse, scale = saved
    h = _standardized(x, mean, inverse)
    dh = _norm_slope(h, inverse, dx.astype(jnp.float32))
    d_shift, d_scale, scale = (each.astype(jnp.float32) for each in (d_shift, d_scale, scale))
    return (dh * (1 + scale) + h * d_scale + d_shift).astype(x.dtype)


def _norm_backward(saved, grad):
    x, mean, inverse, scale = saved
    h, g = _standardized(x, mean, inverse), grad.astype(jnp.float32)
    dx = _norm_slope(h, inverse, g * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    d_shift, d_scale = (each.sum(1, keepdims=True).astype(scale.dtype) for each in (g, g * h))
    return dx, d_shift, d_scale


@functools.cache
def _modulated_norm(eps: float):
    return with_backward(functools.partial(_norm_forward, eps), _norm_tangent, _norm_backward)


def add_gated(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """x + gate·y; x, y: [B, N, D]; gate: [B, 1, D]."""
    x32, gate, y = (each.astype(jnp.float32) for each in (x, gate, y))
    return (x32 + gate * y).astype(x.dtype)


def gelu(x: jax.Array, ops: Ops = Ops()) -> jax.Array:  # noqa: B008
    """GELU in its tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return _gelu_recomputed(x) if ops.recompute else _gelu(x)


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


def _gelu_backward(x, grad):
    return (_gelu_tangent(x, grad),)  # elementwise, so that its transpose is itself


def _gelu_backward_recomputed(x, grad):
    # Without the barrier XLA would store tanh, a float32 array, in the forward pass.
    return _gelu_backward(jax.lax.optimization_barrier(x), grad)


_gelu = with_backward(_gelu_forward, _gelu_tangent, _gelu_backward)
_gelu_recomputed = with_backward(_gelu_forward, _gelu_tangent, _gelu_backward_recomputed)
