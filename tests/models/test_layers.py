import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models import xla
from mdt_jax.models.attention import (
    MASKED_OUT,
    Attention,
    attend,
    bias_at,
    bias_rows,
    contracted,
    scattered,
    token_positions,
)
from mdt_jax.models.layers import add_gated, affine, gelu, modulated_norm
from tests.published import relative_error

KEY = jax.random.key(0)


def normal(*shape, dtype=jnp.float32, key=0):
    return jax.random.normal(jax.random.fold_in(KEY, key), shape).astype(dtype)


def gradients(function, *inputs):
    """Of a sum that weights all outputs differently."""
    weights = normal(*jax.eval_shape(function, *inputs).shape, key=9)

    def total(*inputs):
        return (function(*inputs).astype(jnp.float32) * weights).sum()

    return jax.jit(jax.grad(total, argnums=tuple(range(len(inputs)))))(*inputs)


def plain_affine(x, kernel, bias):
    return x @ kernel + bias


def plain_norm(x, shift, scale):
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False)
    return norm.apply({}, x) * (1 + scale) + shift


def row_major_affine(x, kernel, bias):
    return affine(x, kernel, bias, xla.row_major_transpose)


PLAIN = {
    affine: (plain_affine, [(48, 32), (32, 24), (24,)]),
    row_major_affine: (plain_affine, [(48, 32), (32, 24), (24,)]),
    gelu: (functools.partial(nn.gelu, approximate=True), [(6, 40)]),
    modulated_norm: (plain_norm, [(2, 8, 32), (2, 1, 32), (2, 1, 32)]),
    add_gated: (lambda x, gate, y: x + gate * y, [(2, 8, 32), (2, 1, 32), (2, 8, 32)]),
}


@pytest.mark.parametrize("function", PLAIN, ids=lambda function: function.__name__)
def test_values_and_gradients_are_the_plain_ones(function):
    plain, shapes = PLAIN[function]
    inputs = [normal(*shape, key=i) for i, shape in enumerate(shapes)]
    assert relative_error(function(*inputs), plain(*inputs)) < 1e-6
    expected = gradients(plain, *inputs)
    for got, want in zip(gradients(function, *inputs), expected, strict=True):
        assert got.dtype == want.dtype and relative_error(got, want) < 1e-5


@pytest.mark.parametrize("function", PLAIN, ids=lambda function: function.__name__)
def test_in_bfloat16_parameters_get_float32_gradients(function):
    """Nearer to float32's than a gradient that was summed in bfloat16 can be."""
    plain, shapes = PLAIN[function]
    inputs = [normal(*shape, key=i) for i, shape in enumerate(shapes)]
    rounded = [each.astype(jnp.bfloat16) for each in inputs]
    if function in (affine, row_major_affine):  # whose parameters are float32
        rounded[1:] = inputs[1:]
    assert function(*rounded).dtype == jnp.bfloat16
    assert relative_error(function(*rounded), plain(*inputs)) < 0.01
    expected = gradients(plain, *inputs)
    for given, got, want in zip(rounded, gradients(function, *rounded), expected, strict=True):
        assert got.dtype == given.dtype and relative_error(got, want) < 0.01


def test_a_sum_over_many_tokens_keeps_its_small_parts():
    """2^17 gradients of 1 add up to as many; in bfloat16 the sum would stop at 256."""
    x, kernel = jnp.ones((2**17, 1), jnp.bfloat16), jnp.zeros((1, 1))
    bias = jax.jit(jax.grad(lambda b: affine(x, kernel, b).astype(jnp.float32).sum()))
    assert bias(jnp.zeros(1))[0] == 2**17


def pushed(function, inputs, tangents):
    """The output's tangent."""
    return jax.jit(lambda *both: jax.jvp(function, both[: len(inputs)], both[len(inputs) :])[1])(
        *inputs, *tangents
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_derivatives_are_the_plain_ones(dtype):
    """Of each function with a backward pass of its own, and under vmap."""
    where = token_positions((3, 4), jnp.array([[3, 0, 7], [1, 11, 4]]))
    functions = {
        affine: (plain_affine, [(48, 32), (32, 24), (24,)]),
        gelu: (functools.partial(nn.gelu, approximate=True), [(6, 40)]),
        xla.gradient_barrier: (lambda x: x, [(6, 40)]),
        attend: (plain_attention, [*[(2, 3, 7, 16)] * 3, (3, 1, 7)]),
        lambda table: bias_at(table, where, (3, 4)): (
            lambda table: jnp.moveaxis(table[where.index], -1, 1), [(bias_rows((3, 4)), 2)]
        ),
    }  # fmt: skip
    for ours, (plain, shapes) in functions.items():
        exact = [normal(*shape, key=i) for i, shape in enumerate(shapes)]
        moves = [normal(*shape, key=9 + i) for i, shape in enumerate(shapes)]
        # Parameters and biases stay float32.
        kinds = [dtype] * min(3, len(shapes)) + [jnp.float32] * (len(shapes) - 3)
        if ours is affine:
            kinds[1:] = [jnp.float32] * 2
        inputs, tangents = (
            [each.astype(kind) for each, kind in zip(both, kinds, strict=True)]
            for both in (exact, moves)
        )
        expected = pushed(plain, exact, moves)
        limit = 1e-5 if dtype == jnp.float32 else 0.02
        got = pushed(ours, inputs, tangents)
        assert got.dtype == jax.eval_shape(ours, *inputs).dtype
        assert relative_error(got, expected) < limit
        # Several tangents at once, as jacfwd has them; the gradient of a mapped function.
        several = [jnp.stack([each, -2 * each]) for each in tangents]
        push = functools.partial(pushed, ours, inputs)
        both = jax.vmap(lambda *moves, push=push: push(moves))(*several)
        assert relative_error(both[1], -2 * expected) < limit
        if dtype == jnp.float32:
            stacked = [jnp.stack([each, 0.5 * each]) for each in inputs]
            mapped = gradients(jax.vmap(ours), *stacked)
            for a, b in zip(mapped, gradients(jax.vmap(plain), *stacked), strict=True):
                assert relative_error(a, b) < 1e-5
            twice = [
                jax.grad(lambda x, f=f, rest=exact[1:], t=moves: jnp.sin(
                    pushed(f, (x, *rest), t)).sum())(exact[0])
                for f in (ours, plain)
            ]  # fmt: skip
            assert relative_error(twice[0] + 1, twice[1] + 1) < 1e-5


def plain_attention(q, k, v, bias=None):
    """The library's, whose tokens come before heads, and whose bias has all axes."""
    q, k, v = (jnp.moveaxis(each, 1, 2) for each in (q, k, v))
    if bias is not None:
        bias = bias.reshape(*[1] * (4 - bias.ndim), *bias.shape)
    return jnp.moveaxis(jax.nn.dot_product_attention(q, k, v, bias=bias), 2, 1)


RANKS = ["", "k", "1k", "q1", "qk", "3qk", "31k", "13qk", "23qk", "11qk", "2111"]


@pytest.mark.parametrize("tokens, bias", [  # small matrices are copied, large ones are not
    *[(7, bias) for bias in (None, *RANKS)], (80, None), (80, "13qk"), (80, "23qk"),
])  # fmt: skip
def test_attention_and_its_gradients_are_the_plain_ones(tokens, bias):
    """bias: its axes, of which q and k are as long as there are tokens."""
    inputs = [normal(2, 3, tokens, 16, key=i) for i in range(3)]
    if bias is not None:
        shape = [tokens if axis in "qk" else int(axis) for axis in bias]
        inputs.append(normal(*shape, key=3))
    if bias and bias[-1] == "k":
        inputs[3] += jnp.where(jnp.arange(tokens) < tokens - 2, 0, MASKED_OUT)
    ours = functools.partial(attend, transpose=xla.row_major_transpose)
    if bias is None:
        ours = functools.partial(ours, bias=None)
    assert relative_error(ours(*inputs), plain_attention(*inputs)) < 1e-6
    expected = gradients(plain_attention, *inputs)
    # What is added to all logits of a query alike changes nothing: the gradient is 0.
    without = [False] * 3 + [bias in ("", "q1", "2111")] * (len(inputs) - 3)
    for got, want, no in zip(gradients(ours, *inputs), expected, without, strict=True):
        assert got.shape == want.shape
        assert jnp.abs(got).max() < 1e-5 if no else relative_error(got, want) < 1e-5
    rounded = [each.astype(jnp.bfloat16) for each in inputs[:3]] + inputs[3:]
    assert ours(*rounded).dtype == jnp.bfloat16
    for given, got, want, no in zip(
        rounded, gradients(ours, *rounded), expected, without, strict=True
    ):
        assert got.dtype == given.dtype and (no or relative_error(got, want) < 0.02)


def test_a_residual_streams_gradient_is_summed_once():
    """Its values are those it had; a barrier keeps XLA from fusing the sum into each block."""
    x = normal(4, 8)

    def stream(x):
        return jnp.sin(xla.gradient_barrier(x)) + x

    np.testing.assert_array_equal(xla.gradient_barrier(x), x)
    (expected,) = gradients(lambda x: jnp.sin(x) + x, x)
    assert relative_error(gradients(stream, x)[0], expected) < 1e-6
    assert "optimization_barrier" in str(jax.make_jaxpr(jax.grad(lambda x: stream(x).sum()))(x))


GRIDS = [(4, 6), (6, 4), (1, 5), (5, 5)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_bias_gradient_is_the_same_scattered_and_contracted(grid, masked):
    tokens, heads = grid[0] * grid[1], 3
    ids = None
    if masked:
        noise = jax.random.uniform(KEY, (2, tokens))
        ids = jnp.argsort(noise, axis=-1)[:, : tokens * 2 // 3].astype(jnp.int32)
    where = token_positions(grid, ids)
    table, grad = normal(bias_rows(grid), heads), normal(*where.index.shape[:1], heads, *(
        2 * where.index.shape[-1:]
    ))  # fmt: skip

    def plain(table):
        return jnp.moveaxis(table[where.index], -1, 1)

    value, expected = jax.vjp(plain, table)
    np.testing.assert_array_equal(bias_at(table, where, grid), value)
    for way in (scattered, contracted):
        assert relative_error(way(grid, grad, where), expected(grad)[0]) < 1e-6
    _, backward = jax.vjp(lambda table: bias_at(table, where, grid), table)
    assert relative_error(backward(grad)[0], expected(grad)[0]) < 1e-6


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_accelerators_add_no_gradients_one_by_one(platform):
    ids = jnp.tile(jnp.arange(10, dtype=jnp.int32), (2, 1))
    where, attention = token_positions((4, 4), ids), Attention(2, (4, 4))
    params = attention.init(KEY, normal(2, 10, 16), where)

    def loss(params, x):
        return attention.apply(params, x, where).sum()

    traced = jax.jit(jax.grad(loss)).trace(params, normal(2, 10, 16))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.scatter" in text) == (platform == "cpu")
