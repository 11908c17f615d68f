"""The device mesh, the shardings of arrays on it, and their transfer to it."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import UserError

AXES = ("data", "fsdp")  # batches are split over both, parameters over `fsdp`
SHARDED_FROM = 2**14  # elements; gathering a smaller array costs more than sharding it saves


def mesh_shape(data: int, fsdp: int, devices: int, slices: int = 1) -> tuple[int, int]:
    """The full shape (data, fsdp) of the mesh. Raises UserError if it does not match `devices`.

    data: 0 for devices / fsdp. slices: the number of groups of devices with slow links between
    them; only the axis `data` may cross the links.
    """
    if devices % fsdp or data not in (0, devices // fsdp):
        given = f"mesh.data {data} × mesh.fsdp {fsdp}" if data else f"mesh.fsdp {fsdp}"
        raise UserError(
            f"{given} does not match the {devices} devices: their product must be {devices}, or "
            f"mesh.data 0 and mesh.fsdp a divisor of it"
        )
    data = devices // fsdp
    if data % slices:
        raise UserError(
            f"mesh.data {data} is not divisible by the {slices} slices: mesh.fsdp {fsdp} must fit "
            "into one of them"
        )
    return data, fsdp


def make_mesh(data: int = 0, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of `devices` (default: all) with the axes `data` and `fsdp`.

    On several slices of TPUs only `data` crosses the network between the slices. Raises UserError
    if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, len(devices), len(_slices(devices)))
    return Mesh(place(shape, devices), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def _slices(devices: list) -> set[int]:
    return {getattr(device, "slice_index", 0) for device in devices}


def place(shape: tuple[int, int], devices: list) -> np.ndarray:
    """Devices as an array [data, fsdp] whose neighbours along `fsdp` have the fastest links."""
    slices = len(_slices(devices))
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inside = (shape[0] // slices, shape[1])
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1), devices, allow_split_physical_axes=True
    )


def mesh_of(tree) -> Mesh:
    """The mesh of a tree of arrays; a mesh of all devices if the arrays are on none."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.axis_names == AXES:
            return mesh
    return make_mesh()


def local_mesh() -> Mesh:
    """A mesh as of `make_mesh`, of this process's devices only."""
    devices = np.array(jax.local_devices()).reshape(-1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def sharded(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of the training state.

    It splits the largest axis that is divisible by the size of `fsdp`. An array without such an
    axis or with fewer than SHARDED_FROM elements is replicated.
    """
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < SHARDED_FROM or not divisible:
        return replicated(mesh)
    largest = max(divisible, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))


def gathered(mesh: Mesh, tree):
    """Inside a jitted function: the tree with every array replicated to all devices."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """The rows of an array with first axis `size` on this process's devices: int64, ascending."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in slices]))


def put(tree, sharding: NamedSharding):
    """Transfer a tree of arrays to a mesh, with one sharding.

    Arrays in host memory must be equal in all processes whose devices are in the mesh.
    """
    leaves = jax.tree.leaves(tree)
    if any(isinstance(a, jax.Array) and not a.is_fully_addressable for a in leaves):
        return _relay(sharding)(tree)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])

    with jax.transfer_guard("allow"):  # JAX takes this for an implicit transfer
        return jax.tree.map(one, tree)


@functools.cache
def _relay(sharding: NamedSharding):
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def map_in_batches(
    function: Callable[[jax.Array], Any], array: np.ndarray, size: int, mesh: Mesh
) -> Iterator[Any]:
    """Apply a function to an array, `size` rows at a time, on all devices of a mesh.

    function: takes [size, …], split over the mesh, and returns a tree of arrays [size, …]. array:
    [N, …]; size: a multiple of the mesh's devices. The last batch is padded with zeros, so that one
    compiled program serves all of them, and the padding is cut from its results. Yields a tree of
    NumPy arrays for each batch in order, while the devices already compute the batch that follows.
    """
    split, running = split_batch(mesh), None
    for start in range(0, len(array), size):
        rows = array[start : start + size]
        padding = [(0, size - len(rows)), *[(0, 0)] * (array.ndim - 1)]
        following = len(rows), function(put(np.pad(rows, padding), split))
        if running is not None:
            yield _fetch_rows(*running)
        running = following
    if running is not None:
        yield _fetch_rows(*running)


def _fetch_rows(count: int, tree: Any) -> Any:
    return jax.tree.map(lambda array: hosts.fetch(array)[:count], tree)
