"""Arrays on a mesh: functions applied batch by batch."""

import jax
import numpy as np
import pytest

from mdt_jax.runtime import parallel


@pytest.mark.parametrize("count", [0, 1, 4, 7, 8])
def test_map_in_batches_pads_and_cuts(count):
    """Every batch has one shape; results are those of the rows alone, in order."""
    mesh, shapes = parallel.make_mesh(), []
    size = 4 * mesh.size

    @jax.jit
    def function(batch):
        shapes.append(batch.shape)  # once for each compiled program
        return {"double": 2 * batch, "sum": batch.sum((1, 2))}

    array = np.arange(6 * count * mesh.size, dtype=np.float32).reshape(-1, 2, 3)
    batches = list(parallel.map_in_batches(function, array, size, mesh))
    assert [len(batch["sum"]) for batch in batches] == [
        min(size, len(array) - start) for start in range(0, len(array), size)
    ]
    for start, batch in zip(range(0, len(array), size), batches, strict=True):
        rows = array[start : start + size]
        np.testing.assert_array_equal(batch["double"], 2 * rows)
        np.testing.assert_array_equal(batch["sum"], rows.sum((1, 2)))
    assert shapes == [(size, 2, 3)] * (count > 0)


def test_map_in_batches_computes_one_batch_ahead():
    mesh, started = parallel.make_mesh(), []

    def function(batch):
        started.append(len(started))
        return batch

    batches = parallel.map_in_batches(function, np.zeros((3 * mesh.size, 1)), mesh.size, mesh)
    for expected in ([0, 1], [0, 1, 2], [0, 1, 2]):
        next(batches)
        assert started == expected
