"""Train: python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits

A flag sets any field of the config: --config.optim.lr=1e-3. Rerun the same command to resume an
interrupted run; on the same machine the result is bit-identical to an uninterrupted run (on a GPU
with XLA_FLAGS=--xla_gpu_deterministic_ops=true). SIGTERM and Ctrl-C save before the run ends.
"""

import pathlib
from typing import Any

from mdt_jax import cli
from mdt_jax.runtime import backend, cluster, files
from mdt_jax.train.loop import train
from mdt_jax.train.stopping import StopSignal
from mdt_jax.train.trackers import Monitoring


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    usage = (
        "usage: python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits "
        "[--distributed=auto|off|HOST:PORT --num_processes=N --process_id=I] [--start_timeout=300] "
        "[--patience=60] [--tensorboard] [--wandb=PROJECT] [--profile_steps=10:13] "
        "[--config.field=value …]\nFields and defaults: mdt_jax/config.py"
    )
    optional = {
        **cli.PROCESSES,
        "tensorboard": (False, "write event files to the workdir"),
        "wandb": ("", "the project of Weights & Biases to log to"),
        "profile_steps": ("", "first and last step of a trace: 10:13"),
    }
    stop = StopSignal()
    backend.keep_freed_memory()
    config, flags = cli.parse_config(
        argv, usage, optional, workdir="where checkpoints and results go"
    )
    workdir = pathlib.Path(files.local(flags.workdir))
    processes: list[Any] = [flags[name].value for name in cli.PROCESSES]
    cluster.start(*processes)
    backend.start()
    show = Monitoring(flags.tensorboard, flags.wandb, flags.profile_steps)
    train(config, workdir, show, cli.said(flags), stop)


if __name__ == "__main__":
    cli.run(main)
