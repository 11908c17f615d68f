"""One of several hosts: python -m tests.two_hosts COORDINATOR COUNT INDEX encode|feed ARGUMENTS …

`encode` is the command itself; `feed OUT STEPS …` saves what this host's devices hold of the first
batches of a config.
"""

import itertools
import sys

import jax
import numpy as np

from mdt_jax import cli, encode, inputs, parallel
from mdt_jax import config as configs

if __name__ == "__main__":
    coordinator, count, index, what, *arguments = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(count), int(index))
    if what == "encode":
        sys.argv = ["encode", *arguments]
        cli.run(encode.main)
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
