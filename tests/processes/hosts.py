"""One of several hosts: python -m tests.processes.hosts COORDINATOR COUNT INDEX WHAT ARGUMENTS …

`feed OUT STEPS …` saves what this host's devices hold of the first
batches of a config; `restore OUT WORKDIR …` saves the newest checkpoint's state, gathered; `refused
CASES` starts a run for each line of a file, and prints a line for each: why it was refused.
"""

import contextlib
import itertools
import json
import os
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import inputs, loop
from mdt_jax.train.checkpoints import Checkpoints
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state


def parse(*flags: str):
    """(config, values of the flags)."""
    parser = cli.Parser()
    parser.add_argument("--workdir")
    parser.add_config()
    args = parser.parse_args(flags)
    return cli.read_config(args)[0], args


@contextlib.contextmanager
def damaged_for(process: int):
    """Meanwhile the first step that is restored is damaged, for this process alone."""
    read, failed = ocp.CompositeCheckpointHandler.restore, []

    def restored(handler, folder, args):
        if "params" in set(args.keys()) and jax.process_index() == process and not failed:
            failed.append(folder)
            raise ValueError("a file of its own is damaged")
        return read(handler, folder, args)

    ocp.CompositeCheckpointHandler.restore = restored
    yield
    ocp.CompositeCheckpointHandler.restore = read


def restore(out: str, workdir: str, *arguments: str) -> None:
    config, _ = parse(*arguments)
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    abstract = abstract_state(model, optimizer, mesh)
    with damaged_for(int(os.environ.get("DAMAGED_FOR", -1))):
        state, _ = Checkpoints(workdir).restore(abstract, lambda meta: None)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract
    )
    leaves = [hosts.fetch(leaf) for leaf in jax.tree.leaves(state)]
    if jax.process_index() == 0:
        np.savez(out, *leaves)


def feed(out: str, steps: str, *arguments: str) -> None:
    config, _ = parse(*arguments)
    mesh = parallel.make_mesh()
    configs.validate(config, mesh.size)
    batches = inputs.feed(config, inputs.open_inputs(config), mesh, 0)
    for k, batch in enumerate(itertools.islice(batches, int(steps))):
        for name, array in batch.items():
            for shard in array.addressable_shards:
                np.save(f"{out}/{k}-{name}-{shard.index[0].start or 0}.npy", shard.data)


def refused(cases: str) -> None:
    """cases: a JSON list of [folder to be in, flags …]; @ is the number of the process."""
    number = str(jax.process_index())
    for folder, *flags in json.loads(pathlib.Path(cases).read_text()):
        folder, *flags = (text.replace("@", number) for text in (folder, *flags))
        os.chdir(folder)
        config, values = parse(*flags)
        try:
            loop.train(config, pathlib.Path(values.workdir))
            print("refused: no")
        except UserError as error:
            print("refused:", " ".join(str(error).split()))


if __name__ == "__main__":
    coordinator, count, index, what, *arguments = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(count), int(index))
    {"restore": restore, "feed": feed, "refused": refused}[what](*arguments)
