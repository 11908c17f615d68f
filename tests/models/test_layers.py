import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models import attend, fused, xla
from mdt_jax.models.attention import Attention, bias_at, bias_rows, relative_index
from mdt_jax.models.layers import add_gated, affine, gelu, modulated_norm
from mdt_jax.models.masking import kept_tokens
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
    return affine(x, kernel, bias, ops=xla.Ops(None, xla.row_major_transpose))


def affine_by_matmul(x, kernel, bias):
    return affine(x, kernel, bias, ops=xla.Ops(sum_rows=xla.sum_rows_by_matmul))


def cast_affine(x, kernel, bias):
    """The kernel's values are those of the cast alone."""
    return affine(x, jnp.full_like(kernel, jnp.nan), bias, kernel.astype(x.dtype))


def cast_beside_affine(x, kernel, bias):
    cast = jax.lax.stop_gradient(kernel).astype(x.dtype)
    return affine(x, kernel, bias, cast)


def norm_of_a_cpu(x, shift, scale):
    return modulated_norm(x, shift, scale, xla.Ops(recompute=False))


def norm_with_its_own_gradient(x, shift, scale):
    return modulated_norm(x, shift, scale, xla.Ops(recompute=True))


def gelu_of_a_cpu(x):
    return gelu(x, xla.Ops(recompute=False))


def affine_of_a_cpu(x, kernel, bias):
    return affine(x, kernel, bias, ops=xla.Ops(recompute=False))


PLAIN = {
    affine: (plain_affine, [(48, 32), (32, 24), (24,)]),
    row_major_affine: (plain_affine, [(48, 32), (32, 24), (24,)]),
    affine_by_matmul: (plain_affine, [(48, 32), (32, 24), (24,)]),
    cast_beside_affine: (plain_affine, [(48, 32), (32, 24), (24,)]),
    gelu: (functools.partial(nn.gelu, approximate=True), [(6, 40)]),
    affine_of_a_cpu: (plain_affine, [(48, 32), (32, 24), (24,)]),
    gelu_of_a_cpu: (functools.partial(nn.gelu, approximate=True), [(6, 40)]),
    norm_of_a_cpu: (plain_norm, [(2, 8, 32), (2, 1, 32), (2, 1, 32)]),
    norm_with_its_own_gradient: (plain_norm, [(2, 8, 32), (2, 1, 32), (2, 1, 32)]),
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
    if PLAIN[function][0] is plain_affine:  # whose parameters are float32
        rounded[1:] = inputs[1:]
    assert function(*rounded).dtype == jnp.bfloat16
    assert relative_error(function(*rounded), plain(*inputs)) < 0.01
    expected = gradients(plain, *inputs)
    for given, got, want in zip(rounded, gradients(function, *rounded), expected, strict=True):
        assert got.dtype == given.dtype and relative_error(got, want) < 0.01


@pytest.mark.parametrize("sum_rows", [xla.sum_rows, xla.sum_rows_by_matmul])
def test_a_sum_over_many_tokens_keeps_its_small_parts(sum_rows):
    """2^17 gradients of 1 add up to as many; in bfloat16 the sum would stop at 256."""
    x, kernel, ops = jnp.ones((2**17, 1), jnp.bfloat16), jnp.zeros((1, 1)), xla.Ops(None)
    ops = ops._replace(sum_rows=sum_rows)
    bias = jax.jit(jax.grad(lambda b: affine(x, kernel, b, ops=ops).astype(jnp.float32).sum()))
    assert bias(jnp.zeros(1))[0] == 2**17


def test_with_a_cast_the_kernels_values_are_not_used():
    x, kernel, bias = (normal(*shape, key=i) for i, shape in enumerate([(6, 4), (4, 3), (3,)]))
    np.testing.assert_array_equal(cast_affine(x, kernel, bias), affine(x, kernel, bias))
    unused = jnp.full_like(kernel, jnp.nan)
    for got, want in zip(
        gradients(functools.partial(affine, cast=kernel), x, unused, bias),
        gradients(affine, x, kernel, bias), strict=True,
    ):  # fmt: skip
        assert relative_error(got, want) < 1e-6


def pushed(function, inputs, tangents):
    """The output's tangent."""
    return jax.jit(lambda *both: jax.jvp(function, both[: len(inputs)], both[len(inputs) :])[1])(
        *inputs, *tangents
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_derivatives_are_the_plain_ones(dtype):
    """Of each function with a backward pass of its own, and under vmap."""
    functions = {
        affine: (plain_affine, [(48, 32), (32, 24), (24,)]),
        gelu: (functools.partial(nn.gelu, approximate=True), [(6, 40)]),
        xla.gradient_barrier: (lambda x: x, [(6, 40)]),
        norm_with_its_own_gradient: (plain_norm, [(2, 8, 32), (2, 1, 32), (2, 1, 32)]),
        attend.plain: (library_attention, [*[(2, 7, 3, 16)] * 3, (1, 3, 7, 7)]),
        lambda table: bias_at(table, (3, 4)): (
            functools.partial(plain_bias, (3, 4)), [(bias_rows((3, 4)), 2)]
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


def library_attention(q, k, v, bias=None, visible=None):
    mask = None if visible is None else visible[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)


def cudnn_in_xla(q, k, v, bias=None, visible=None):
    """The arithmetic of cuDNN's form: the same padding, channels and rounded bias."""
    return fused.cudnn(q, k, v, bias, visible, implementation="xla")


def row_major_attention(q, k, v, bias=None, visible=None):
    return attend.plain(q, k, v, bias, visible, transpose=xla.row_major_transpose)


NORMS = ("query_norm", "key_norm")
CASES = [  # tokens, of which visible, and channels of a head
    (7, None, 16), (8, 5, 16), (80, None, 64), (64, 45, 64), (81, 60, 72), (256, 179, 72),
    (256, 128, 64),
]  # fmt: skip


@pytest.mark.parametrize("form", [attend.plain, row_major_attention, cudnn_in_xla])
@pytest.mark.parametrize("tokens, kept, depth", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_attention_and_its_gradients_are_those_of_the_library(form, tokens, kept, depth, bias):
    """In float32 to 2e-6; hidden keys get no weight and no gradient."""
    inputs = [normal(2, tokens, 3, depth, key=i) for i in range(3)]
    if bias:
        inputs.append(normal(1, 3, tokens, tokens, key=3))
    visible = None
    if kept is not None:
        order = jnp.argsort(jax.random.uniform(KEY, (2, tokens)), axis=-1)
        visible = order < kept
    ours, theirs = (
        lambda q, k, v, bias=None, f=f: f(q, k, v, bias, visible) for f in (form, library_attention)
    )
    assert relative_error(ours(*inputs), theirs(*inputs)) < 1e-6
    got, expected = gradients(ours, *inputs), gradients(theirs, *inputs)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 2e-6
    if visible is not None:
        assert not np.any(np.asarray(got[1])[~np.asarray(visible)])
        assert not np.any(np.asarray(got[2])[~np.asarray(visible)])
    rounded = [each.astype(jnp.bfloat16) for each in inputs[:3]] + inputs[3:]
    assert ours(*rounded).dtype == jnp.bfloat16
    for given, a, b in zip(rounded, gradients(ours, *rounded), expected, strict=True):
        assert a.dtype == given.dtype and relative_error(a, b) < 0.02


@pytest.mark.parametrize("form", [attend.plain, cudnn_in_xla])
@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_kept_tokens_attend_as_if_there_were_no_others(form, relative_bias, qk_norm):
    """Attention over the grid with hidden tokens against attention over the kept ones alone."""
    grid, heads = (4, 6), 2
    noise = jax.random.uniform(KEY, (3, 24))
    ids = jnp.argsort(noise, axis=-1)[:, :17].astype(jnp.int32)
    module = Attention(heads, grid, relative_bias, xla.Ops(attend=form), qk_norm)
    x, kept = normal(3, 17, 16), kept_tokens(ids, None, 24)
    params = module.init(KEY, x, kept)["params"]

    def ours(params, x):
        return module.apply({"params": params}, x, kept)

    def alone(params, x):
        qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
        q, k, v = jnp.moveaxis(qkv.reshape(3, 17, 3, heads, -1), 2, 0)
        if qk_norm:
            q, k = (
                x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]
                for x, name in ((q, "query_norm"), (k, "key_norm"))
            )
        bias = None
        if relative_bias:
            index = relative_index(grid)[ids[:, :, None], ids[:, None, :]]
            bias = jnp.moveaxis(params["relative_bias"][index], -1, 1)
        out = library_attention(q, k, v, bias).reshape(3, 17, -1)
        return out @ params["proj"]["kernel"] + params["proj"]["bias"]

    assert relative_error(ours(params, x), alone(params, x)) < 2e-6

    def total(function, params, x):
        return (function(params, x) * normal(3, 17, 16, key=5)).sum()

    got, expected = (
        jax.grad(functools.partial(total, function), argnums=(0, 1))(params, x)
        for function in (ours, alone)
    )
    for a, b in zip(got, expected, strict=True):  # of all parameters together, and of x
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("recompute", [True, False])
def test_attention_with_normalised_queries_and_keys_written_out(recompute):
    """In NumPy and float64, among all tokens and among kept ones."""
    grid, heads, depth = (3, 4), 2, 8
    module = Attention(heads, grid, True, xla.Ops(recompute=recompute), qk_norm=True)
    x = normal(2, 12, heads * depth)
    params = module.init(KEY, x)["params"]
    assert all((params[name]["scale"] == np.ones(depth)).all() for name in NORMS)
    params |= {name: {"scale": 1 + 0.5 * normal(depth, key=i)} for i, name in enumerate(NORMS)}
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    ids = np.array([[7, 0, 3, 11, 4], [1, 2, 10, 5, 9]], np.int32)
    index = relative_index(grid)
    every = np.broadcast_to(np.arange(12), (2, 12))
    for tokens, kept, at in ((x, None, every), (x[:, :5], kept_tokens(ids, None, 12), ids)):
        out = module.apply({"params": params}, tokens, kept)
        qkv = np.asarray(tokens, np.float64) @ exact["qkv"]["kernel"] + exact["qkv"]["bias"]
        q, k, v = np.moveaxis(qkv.reshape(2, -1, 3, heads, depth), (2, 3), (0, 2))
        q, k = (
            each / np.sqrt((each**2).mean(-1, keepdims=True) + 1e-6) * exact[name]["scale"]
            for each, name in zip((q, k), NORMS, strict=True)
        )
        bias = exact["relative_bias"][index[at[:, :, None], at[:, None, :]]]
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(depth) + np.moveaxis(bias, -1, 1)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = np.moveaxis(weights @ v, 1, 2).reshape(2, -1, heads * depth)
        expected = expected @ exact["proj"]["kernel"] + exact["proj"]["bias"]
        assert relative_error(out, expected) < 2e-6


def test_in_bfloat16_queries_and_keys_are_normalised_in_float32():
    """They are what float64 gives, rounded once, and of length √(head size)."""
    seen = []

    def record(q, k, v, bias, visible):
        seen.append((q, k))
        return v

    x = 1000 * normal(2, 12, 144, dtype=jnp.bfloat16)
    for qk_norm in (False, True):
        ops = xla.Ops(jnp.dtype(jnp.bfloat16), attend=record)
        module = Attention(2, (3, 4), False, ops, qk_norm)
        module.apply(module.init(KEY, x), x)
    for plain, normalised in zip(seen[0], seen[-1], strict=True):
        assert plain.dtype == normalised.dtype == jnp.bfloat16
        plain, normalised = (np.asarray(each, np.float64) for each in (plain, normalised))
        expected = plain / np.sqrt((plain**2).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(normalised, expected, rtol=2**-8 * 1.01)
        np.testing.assert_allclose(np.linalg.norm(normalised, axis=-1), 72**0.5, rtol=2**-8)


def test_why_a_fused_form_is_not_taken():
    """The library's own checks decide; here there is neither a GPU nor cuDNN."""
    assert "cuDNN" in fused.refusal(fused.cudnn, 256, 72, "bfloat16", True)
    assert not fused.refusal(cudnn_in_xla, 256, 72, "bfloat16", True)
    assert not fused.refusal(attend.plain, 7, 9, "float32", False)


def test_a_residual_streams_gradient_is_summed_once():
    """Its values are those it had; a barrier keeps XLA from fusing the sum into each block."""
    x = normal(4, 8)

    def stream(x):
        return jnp.sin(xla.gradient_barrier(x)) + x

    np.testing.assert_array_equal(xla.gradient_barrier(x), x)
    (expected,) = gradients(lambda x: jnp.sin(x) + x, x)
    assert relative_error(gradients(stream, x)[0], expected) < 1e-6
    assert "optimization_barrier" in str(jax.make_jaxpr(jax.grad(lambda x: stream(x).sum()))(x))


def plain_bias(grid, table):
    return jnp.moveaxis(table[relative_index(grid)], -1, 0)[None]


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (1, 5), (5, 5)])
def test_the_gradient_of_the_bias_table(grid):
    tokens, heads = grid[0] * grid[1], 3
    table, grad = normal(bias_rows(grid), heads), normal(1, heads, tokens, tokens)
    value, expected = jax.vjp(functools.partial(plain_bias, grid), table)
    got, backward = jax.vjp(lambda table: bias_at(table, grid), table)
    np.testing.assert_array_equal(got, value)
    assert relative_error(backward(grad)[0], expected(grad)[0]) < 1e-6


def test_no_gradients_are_added_one_by_one():
    kept = kept_tokens(jnp.tile(jnp.arange(10, dtype=jnp.int32), (2, 1)), None, 16)
    attention = Attention(2, (4, 4))
    params = attention.init(KEY, normal(2, 10, 16), kept)

    def loss(params, x):
        return attention.apply(params, x, kept).sum()

    assert (
        "stablehlo.scatter"
        not in jax.jit(jax.grad(loss)).lower(params, normal(2, 10, 16)).as_text()
    )
