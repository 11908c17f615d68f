"""One of several hosts: python -m tests.hosts COORDINATOR COUNT INDEX WHAT ARGUMENTS …

`encode` is the command itself; `feed OUT STEPS …` saves what this host's devices hold of the first
batches of a config; `restore OUT WORKDIR …` saves the newest checkpoint's state, gathered.
"""

import itertools
import sys

import jax
import numpy as np

from mdt_jax import cli, distributed, encode, inputs, parallel
from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT
from mdt_jax.train.checkpoints import Checkpoints
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state

if __name__ == "__main__":
    coordinator, count, index, what, *arguments = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(count), int(index))
    if what == "encode":
        sys.argv = ["encode", *arguments]
        cli.run(encode.main)
    elif what == "restore":
        out, workdir, *arguments = arguments
        config, _ = cli.parse_config(["restore", *arguments], "")
        mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
        model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
        abstract = abstract_state(model, optimizer, mesh)
        state, _ = Checkpoints(workdir).restore(abstract, lambda meta: None)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
            lambda leaf: leaf.sharding, abstract
        )
        leaves = [distributed.fetch(leaf) for leaf in jax.tree.leaves(state)]
        if jax.process_index() == 0:
            np.savez(out, *leaves)
    else:
        out, steps, *arguments = arguments
        config, _ = cli.parse_config(["feed", *arguments], "")
        mesh = parallel.make_mesh()
        configs.validate(config, mesh.size)
        source, _ = inputs.open_data(config)
        batches = inputs.feed(config, source, mesh, None, 0)
        for k, batch in enumerate(itertools.islice(batches, int(steps))):
            for name, array in batch.items():
                for shard in array.addressable_shards:
                    np.save(f"{out}/{k}-{name}-{shard.index[0].start or 0}.npy", shard.data)
