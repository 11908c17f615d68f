"""The device mesh and how arrays lie on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices along one axis, `data`, over which batches are split."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """As `data_mesh`, of this process's devices alone."""
    return Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array: parameters, optimiser state, EMA."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Which places along a first axis of `size` lie on this process's devices; int64, ascending."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in slices]))
