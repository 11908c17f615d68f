"""One step for one device and for many: the same numbers, whatever the mesh."""

import types

import jax
import numpy as np
import pytest

from mdt_jax.runtime import parallel
from mdt_jax.runtime.errors import UserError
from tests.conftest import SMOKE, XLA_FLAGS, run_command, start_command
from tests.processes.devices import DEVICES, VARIANTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("devices")
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count={DEVICES}"
    process = start_command("tests.processes.devices", str(out), XLA_FLAGS=flags)
    printed = process.communicate(timeout=1200)
    assert process.returncode == 0, printed
    return {name: np.load(out / f"{name}.npz") for name in [*VARIANTS, "draws"]}


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith("one")])
def test_twenty_steps_are_those_of_one_device(name, runs):
    run, one = runs[name], runs["v2_one" if name.startswith("v2") else "one"]
    np.testing.assert_allclose(run["losses"], one["losses"], rtol=2e-6)
    moved = difference = 0.0
    for path in one:
        if path.startswith("after"):
            before = np.float64(one[path.replace("after", "before")])
            moved += np.square(one[path] - before).sum()
            difference += np.square(np.float64(run[path]) - one[path]).sum()
    assert moved > 0 and (difference / moved) ** 0.5 < 1e-4


def test_no_device_repeats_another_ones_noise(runs):
    draws = runs["draws"]
    np.testing.assert_array_equal(draws["spread"], draws["one"])
    rows = draws["spread"].reshape(32, -1)
    assert len(np.unique(rows[:, 0])) == 32
    assert np.abs(np.corrcoef(rows) - np.eye(32)).max() < 0.7


def test_mesh_shapes():
    assert parallel.mesh_shape(0, 1, 8) == (8, 1)
    assert parallel.mesh_shape(0, 4, 8) == parallel.mesh_shape(2, 4, 8) == (2, 4)
    assert parallel.mesh_shape(0, 64, 256, slices=2) == (4, 64)
    for shape, said in [
        ((0, 3, 8), "mesh.fsdp 3 does not match the 8 devices"),
        ((4, 4, 8), "mesh.data 4 × mesh.fsdp 4 does not match the 8 devices"),
        ((0, 8, 8, 2), "mesh.data 1 is not divisible by the 2 slices"),
    ]:
        with pytest.raises(UserError, match=said):
            parallel.mesh_shape(*shape)


def test_several_slices_are_joined_by_data_alone():
    """Devices of two slices in any order; a mesh needs no more of a device than these fields."""

    def device(number):
        return types.SimpleNamespace(
            id=number, slice_index=number % 2, process_index=number % 4, platform="cpu",
            device_kind="cpu",
        )  # fmt: skip

    mesh = parallel.place((4, 2), [device(n) for n in range(8)])
    slices = np.vectorize(lambda d: d.slice_index)(mesh)
    assert slices.shape == (4, 2) and (slices[:, 0] == slices[:, 1]).all()
    assert sorted(slices[:, 0]) == [0, 0, 1, 1] and slices[0, 0] == slices[1, 0]


def test_samples_are_drawn_on_the_mesh_of_their_parameters():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    tree = {"a": np.zeros(3), "b": jax.device_put(np.zeros(3), parallel.replicated(mesh))}
    assert parallel.mesh_of(tree) is tree["b"].sharding.mesh
    assert parallel.mesh_of({"a": np.zeros(3)}).size == jax.device_count()


def test_the_rule_of_sharding():
    mesh = jax.sharding.AbstractMesh((2, 4), parallel.AXES)

    def spec(*shape):
        return tuple(parallel.sharded(mesh, shape).spec)

    assert spec(28, 1152, 4608) == (None, None, "fsdp")
    assert spec(28, 4608, 1152) == (None, "fsdp")
    assert spec(28, 1152, 1152) == (None, None, "fsdp")  # of equals the last
    assert spec(28, 964, 16) == (None, "fsdp")
    assert spec(1001, 1152) == (None, "fsdp")
    assert spec(1152) == spec(3, 6145) == spec() == ()  # small, or nothing divisible


def test_batch_not_divisible_by_the_devices(tmp_path):
    printed = run_command(
        "mdt_jax.main", *SMOKE, f"--workdir={tmp_path / 'run'}", "--config.data.batch_size=12",
        expect=2, XLA_FLAGS=f"{XLA_FLAGS} --xla_force_host_platform_device_count=8",
    )  # fmt: skip
    assert printed.strip() == "error: data.batch_size 12 is not divisible by the 8 devices"
