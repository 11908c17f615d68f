"""Train: python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits

A flag sets any field of the config: --config.optim.lr=1e-3. Rerun the same command to resume an
interrupted run; on the same machine the result is bit-identical to an uninterrupted run (on a GPU
with XLA_FLAGS=--xla_gpu_deterministic_ops=true). SIGTERM and Ctrl-C save before the run ends.
"""

import argparse

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError
from mdt_jax.train.loop import train
from mdt_jax.train.stopping import StopSignal
from mdt_jax.train.trackers import Monitoring


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.main",
        usage="python -m mdt_jax.main --config=FILE --workdir=FOLDER [--flag=value …]",
        description="Train a model, or resume its run. --config.GROUP.FIELD=VALUE sets a field.",
    )
    add = parser.add_argument
    add(
        "--workdir",
        default="",
        type=cli.anywhere,
        help="folder of the run's checkpoints and results",
    )
    add("--tensorboard", **cli.SWITCH, help="write event files to the workdir")
    add("--wandb", default="", metavar="PROJECT", help="log to a project of Weights & Biases")
    add("--profile_steps", default="", metavar="FIRST:LAST", help="steps to profile, as 10:13")
    parser.add_processes()
    parser.add_config()
    args = parser.parse_args(argv[1:])
    if not args.workdir:
        raise UserError("--workdir is missing: the folder of the run's checkpoints and results")
    return args


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    stop = StopSignal(ends_process=True)
    args = parse(argv)
    config, given = cli.read_config(args)
    cli.start(args, keep_memory=True)
    show = Monitoring(args.tensorboard, args.wandb, args.profile_steps)
    train(config, args.workdir, show, given, stop)


if __name__ == "__main__":
    cli.run(main)
