"""The kernels run in Pallas's interpreter of a TPU, against float64 formulas in NumPy."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mdt_jax.models.tpu_attention import fits, tpu
from tests.conftest import ROOT, XLA_FLAGS
from tests.published import relative_error

LIMITS = {"float32": 2e-6, "bfloat16": 5e-3}  # the second is about one rounding to bfloat16


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield


def arrays(batch, length, heads, size, dtype="float32", seed=0):
    """q, k, v, the bias and the kept keys: 70 % of each sample's."""
    random = np.random.default_rng(seed)
    q, k, v = jnp.asarray(random.normal(size=(3, batch, length, heads, size)), dtype)
    bias = jnp.asarray(random.normal(size=(1, heads, length, length)), jnp.float32)
    kept = random.random((batch, length)).argsort() < 0.7 * length
    return (q, k, v, bias), jnp.asarray(kept)


def exact_weights(q, k, bias, kept):
    logits = np.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
    weights = np.exp(logits) * kept[:, None, None]
    return weights / weights.sum(-1, keepdims=True)


def exact(inputs, kept, grad):
    """The output, and the gradients of q, k, v and the bias, in float64."""
    q, k, v, bias, grad = (np.asarray(each, np.float64) for each in (*inputs, grad))
    weights = exact_weights(q, k, bias, kept)
    d_weights = np.einsum("bihd,bjhd->bhij", grad, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    scaled = d_logits * q.shape[-1] ** -0.5
    return np.einsum("bhij,bjhd->bihd", weights, v), (
        np.einsum("bhij,bjhd->bihd", scaled, k),
        np.einsum("bhij,bihd->bjhd", scaled, q),
        np.einsum("bhij,bihd->bjhd", weights, grad),
        d_logits.sum(0, keepdims=True),
    )


def exact_tangent(inputs, kept, tangents):
    """The derivative along `tangents`, by a complex step, which rounds to float64 alone."""
    pairs = zip(inputs, tangents, strict=True)
    q, k, v, bias = (np.asarray(x, float) + 1e-30j * np.asarray(dx, float) for x, dx in pairs)
    return np.einsum("bhij,bjhd->bihd", exact_weights(q, k, bias, kept), v).imag / 1e-30


def compare(inputs, kept):
    """The output and each gradient against `exact`."""
    dtype = inputs[0].dtype
    grad = jnp.asarray(np.random.default_rng(9).normal(size=inputs[0].shape), dtype)
    out, back = jax.vjp(lambda *moving: tpu(*moving, kept), *inputs)
    found, keys = (out, *back(grad)), np.ones(out.shape[:2]) if kept is None else kept
    expected_out, expected = exact(inputs, keys, grad)
    assert [each.dtype for each in found] == [*[dtype] * 4, jnp.float32]
    for each, right in zip(found, (expected_out, *expected), strict=True):
        assert each.shape == right.shape
        assert relative_error(each, right) < LIMITS[dtype.name]


# 3 heads of 64 or 72 are one block, 4 heads of 64 two blocks.
@pytest.mark.parametrize("shape", [(3, 27, 3, 72), (2, 64, 4, 64), (2, 32, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS)
def test_outputs_and_gradients_are_exact(shape, dtype):
    inputs, kept = arrays(*shape, dtype)
    compare(inputs, kept)
    compare(inputs, None)


def test_at_the_recipes_lengths():
    for length in (179, 256):
        compare(*arrays(2, length, 2, 72))


def test_without_a_bias():
    (q, k, v, bias), kept = arrays(2, 27, 2, 64)

    def run(bias):
        out, back = jax.vjp(lambda *moving: tpu(*moving, bias, kept), q, k, v)
        return out, *back(v)

    for found, expected in zip(run(None), run(0 * bias), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_hidden_keys_have_no_influence():
    (q, k, v, bias), kept = arrays(2, 27, 2, 64)
    hidden = ~kept[:, :, None, None]
    moved = tpu(q, k + 100 * hidden, v + 100 * hidden, bias, kept)
    np.testing.assert_array_equal(moved, tpu(q, k, v, bias, kept))


@pytest.mark.parametrize("dtype", LIMITS)
def test_forward_mode(dtype):
    inputs, kept = arrays(2, 27, 2, 72, dtype)
    tangents, _ = arrays(2, 27, 2, 72, dtype, seed=1)
    out, tangent = jax.jvp(lambda *moving: tpu(*moving, kept), inputs, tangents)
    np.testing.assert_array_equal(out, tpu(*inputs, kept))
    assert relative_error(tangent, exact_tangent(inputs, kept, tangents)) < LIMITS[dtype]


@pytest.mark.parametrize("asked", ["highest", "default"])
@pytest.mark.parametrize("dtype, expected", [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_the_precision_of_the_products(asked, dtype, expected):
    """float32 keeps all bits, whatever JAX is asked for; products of bfloat16 are exact anyway."""
    (*moving, bias), kept = arrays(2, 16, 2, 64, dtype)

    def run(grad):
        return jax.vjp(lambda *moving: tpu(*moving, bias, kept), *moving)[1](grad)

    with jax.default_matmul_precision(asked):
        jaxpr = str(jax.make_jaxpr(run)(moving[2]))
    found = re.findall(r"precision=\(Precision.(\w+), Precision.(\w+)\)", jaxpr)
    # 7 products for each head, 2 of them in the forward pass.
    assert found == [(expected, expected)] * 14 and jaxpr.count("dot_general[") == 14


@pytest.mark.parametrize("sizes, kind, expected", [
    ((256, 16, 72, "bfloat16"), "TPU v5 lite", True), ((256, 16, 72, "bfloat16"), "TPU v4", False),
    ((256, 6, 64, "bfloat16"), "TPU v4", True), ((256, 16, 72, "float32"), "TPU v5", True),
    ((1024, 16, 64, "bfloat16"), "TPU v5", True), ((1024, 16, 72, "bfloat16"), "TPU v5", False),
])  # fmt: skip
def test_which_sizes_fit(sizes, kind, expected):
    assert fits(*sizes, kind) == expected


FOUR_DEVICES = """
import jax, numpy as np
from jax.experimental.pallas import tpu as pltpu
from mdt_jax.models.tpu_attention import on_mesh, tpu
from mdt_jax.runtime import parallel
from tests.models.test_tpu_attention import arrays
from tests.published import relative_error

mesh = parallel.make_mesh(2, 2)
split, whole = parallel.split_batch(mesh), parallel.replicated(mesh)
inputs, kept = arrays(8, 27, 2, 64)
grad = np.asarray(inputs[0])[::-1]

def both(attend, *shardings):
    def run(inputs, kept, grad):
        out, back = jax.vjp(lambda *moving: attend(*moving, kept), *inputs)
        return out, back(grad)
    given = jax.device_put((inputs, kept, grad), shardings or None)
    with pltpu.force_tpu_interpret_mode():
        return jax.jit(run)(*given)

out, grads = both(on_mesh(mesh), (split, split, split, whole), split, split)
assert out.sharding.is_equivalent_to(split, 4), out.sharding
assert grads[3].sharding.is_fully_replicated
expected = both(tpu)
error = relative_error((out, grads), expected)
assert error < 5e-7, error
"""


def test_on_several_devices():
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        check=True,
    )
