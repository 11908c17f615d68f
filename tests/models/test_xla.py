"""What makes XLA run the network fast changes no number, and depends on nothing but the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models import xla
from mdt_jax.models.mdt import MDT, STACKS
from tests.models.common import random_params
from tests.published import relative_error

MODEL = MDT(
    input_size=(8, 8), in_channels=1, hidden_size=16, depth=3, num_heads=2, num_classes=3,
    decoder_layers=1,
)  # fmt: skip
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
T, Y = jnp.array([10, 900]), jnp.array([0, 3])


def loss(model, params):
    return model.apply({"params": params}, X, T, Y, jnp.tile(jnp.arange(9), (2, 1))).sum()


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


PARAMS = shapes_of(random_params(MODEL))


def test_a_model_traces_alike_on_all_devices(monkeypatch):
    model = MODEL.clone(dtype=jnp.bfloat16)

    def traced():
        jax.clear_caches()
        return str(jax.make_jaxpr(jax.grad(functools.partial(loss, model)))(PARAMS))

    expected = traced()
    for platform, devices in (("cpu", 1), ("gpu", 1), ("tpu", 8)):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        assert traced() == expected


@pytest.mark.parametrize("platform, devices, depth, unroll, row_major", [
    ("cpu", 1, 12, True, True), ("cpu", 8, 12, True, False), ("cpu", 1, 28, False, True),
    ("gpu", 1, 28, True, False), ("tpu", 8, 28, False, False),
])  # fmt: skip
def test_the_fields_for_devices(platform, devices, depth, unroll, row_major):
    model = xla.for_devices(MODEL.clone(depth=depth), platform, devices)
    transpose = xla.row_major_transpose if row_major else jnp.matrix_transpose
    assert (model.unroll, model.ops.transpose) == (unroll, transpose)
    sum_rows = xla.sum_rows_by_matmul if platform == "cpu" else xla.sum_rows
    assert model.ops.sum_rows is sum_rows
    assert model.modulate_first == (platform != "cpu")
    plain = dict(unroll=False, modulate_first=False, ops=MODEL.ops)
    assert model.clone(**plain) == MODEL.clone(depth=depth)
    assert model.ops.recompute == (platform != "cpu")
    # Equal models of equal devices share a compiled program.
    assert model == xla.for_devices(MODEL.clone(depth=depth), platform, devices)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_fields_for_devices_change_no_number(dtype):
    model, params = MODEL.clone(dtype=dtype), random_params(MODEL)
    (tuned, slopes), (plain, expected) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, each)))(params)
        for each in (xla.for_devices(model, "cpu", 1), model)
    )
    limit = 5e-6 if dtype == jnp.float32 else 0.03
    assert abs(tuned - plain) < limit * abs(plain) and relative_error(slopes, expected) < limit


def test_bfloat16_and_small_matrices_are_copied_into_row_major_order():
    def copied(x):
        return "LayoutConstraint" in jax.jit(xla.row_major_transpose).lower(x).as_text()

    half, small, large = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((3, 2, 16, 8)), jnp.ones((80, 16))
    assert copied(half) and copied(small) and not copied(large)
    for size in (half, small, large, jnp.ones((3, 2, 80, 16))):
        x = jnp.arange(size.size, dtype=size.dtype).reshape(size.shape)
        np.testing.assert_array_equal(xla.row_major_transpose(x), x.mT)


@pytest.mark.parametrize("remat", xla.REMAT)
def test_the_backward_pass_gathers_parameters_again(remat):
    """It would otherwise save what the forward pass gathered: the whole network on each device."""
    mesh = jax.make_mesh((1,), ("fsdp",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def gather(tree):
        return jax.lax.with_sharding_constraint(tree, whole)

    model = MODEL.clone(dtype=jnp.bfloat16, remat=remat, gather=gather)
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, model)))(PARAMS)
    stacks = jax.tree.leaves({name: PARAMS[name] for name in STACKS if name in PARAMS})
    # One constraint for each array in the forward pass, one for its gradient, and the new ones.
    assert str(jaxpr).count("sharding_constraint[") > 2 * len(stacks)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_passes_share_changes_no_number(version, dtype):
    """Casts and position biases that are computed once for all passes."""
    model = MODEL.clone(version=version, dtype=dtype, depth=5)
    params = random_params(model)

    def prepared(params):
        return loss(model, model.prepare(params))

    (once, slopes), (each, expected) = (
        jax.jit(jax.value_and_grad(function))(params)
        for function in (prepared, functools.partial(loss, model))
    )
    assert abs(once - each) <= 1e-6 * abs(each)
    assert jax.tree.structure(slopes) == jax.tree.structure(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slopes))
    assert relative_error(slopes, expected) < 1e-6


def test_large_position_biases_are_looked_up_block_by_block(monkeypatch):
    params = random_params(MODEL)
    assert xla.BIAS in MODEL.prepare(params)["encoder"]["attention"]
    monkeypatch.setattr(xla, "BIAS_BYTES", 4 * 4 * 2 * 16**2 - 1)
    assert xla.BIAS not in MODEL.prepare(params)["encoder"]["attention"]
    assert xla.BIAS not in params["encoder"]["attention"]


def test_devices_gather_the_casts_of_kernels():
    """Half the bytes of the float32 kernels, which are not gathered."""
    gathered = []

    def gather(tree):
        gathered.extend((leaf.dtype.name, leaf.ndim) for leaf in jax.tree.leaves(tree))
        return tree

    model = MODEL.clone(dtype=jnp.bfloat16, gather=gather)
    params = random_params(MODEL)
    without = {name: params[name] for name in params if name in STACKS}

    def total(blocks):
        return loss(model, model.prepare(params | blocks))

    gradient = jax.eval_shape(jax.grad(total), without)
    assert jax.tree.map(lambda leaf: leaf.shape, gradient) == jax.tree.map(jnp.shape, without)
    matrices = [dtype for dtype, ndim in gathered if ndim == 2]
    others = [leaf for name, tree in params.items() if name not in STACKS
              for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]  # fmt: skip
    assert matrices.count("float32") == len(others) and matrices.count("bfloat16") > 10


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_modulations_that_are_computed_first(version):
    model = MODEL.clone(version=version, depth=5)
    params = random_params(model)
    c = model.apply({"params": params}, T, Y, method="conditioning")
    modulated = model.with_modulations(params, model.modulations(params, c))
    blocks = [name for name in STACKS if name in params and name != "side_interpolater"]
    assert all("linear" not in modulated[name]["modulation"] for name in blocks)
    out, expected = (model.apply({"params": each}, X, T, Y) for each in (modulated, params))
    assert relative_error(out, expected) < 1e-6
