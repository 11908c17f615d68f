"""What a config costs: python -m mdt_jax.info --config=configs/v2_xl2.py

Prints the number of parameters, the multiply-accumulates of both passes, the tokens that the masked
pass keeps, the memory that a training step needs by the compiler's plan for this machine's devices,
and these devices. Nothing is trained, and that memory is not allocated. --fields prints all fields
of a config.
"""

import argparse
import platform

import jax
from ml_collections import ConfigDict

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.config.fields import markdown
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.progress import log, print_result
from mdt_jax.train import costs


def report(config: ConfigDict) -> dict[str, str]:
    """The lines to print, by name."""
    model = MDT.from_config(config)
    total, sampling = costs.parameter_counts(model)
    lines = {
        "parameters": f"{total:,} ({sampling:,} without the training-only part)",
        "full pass": f"{costs.pass_macs(model) / 1e9:.2f} GMAC an image",
    }
    lengths = costs.kept_lengths(config, model.num_tokens)
    if lengths is not None:
        work = [f"{costs.pass_macs(model, kept) / 1e9:.2f}" for kept in lengths]
        drawn = ", drawn for each step" if lengths[0] < lengths[1] else ""
        lines["masked pass"] = f"{_range(*work)} GMAC an image"
        lines["kept lengths"] = f"{_range(*lengths)} of {model.num_tokens} tokens{drawn}"
    lines["training"] = f"{costs.training_flops(config, model) / 1e12:.2g} TFLOP an image"
    memory, devices = costs.step_memory(config, model), jax.device_count()
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    lines["memory of a step"] = (
        f"{sum(memory.values()) / 2**30:.2f} GiB on each device for a batch of "
        f"{config.data.batch_size // devices} ({parts})"
    )
    lines["this machine"] = (
        f"{devices} × {jax.devices()[0].device_kind}, JAX {jax.__version__}, "
        f"Python {platform.python_version()}"
    )
    return lines


def _range(low: object, high: object) -> str:
    return f"{low}" if low == high else f"{low}–{high}"


class _PrintFields(argparse.Action):
    """--fields: print the list of fields and exit, as --help does."""

    def __call__(self, parser, *_):
        print_result(markdown())
        parser.exit()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.info",
        usage="python -m mdt_jax.info --config=FILE [--config.GROUP.FIELD=VALUE …] | --fields",
        description="Print what training a config costs.",
    )
    parser.add_argument(
        "--fields", nargs=0, action=_PrintFields, help="print all fields of a config as Markdown"
    )
    parser.add_config()
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    """Parse the flags and print."""
    args = parse(argv)
    config, _ = cli.read_config(args)
    cli.start(args)
    configs.validate(config, jax.device_count())
    if config.model.num_classes < 0:
        log("model.num_classes is -1, and info reads no data: counted as 0")
        config.model.num_classes = 0
    log("compiling a training step to measure its memory …")
    for name, text in report(config).items():
        print_result(f"{name:<17}{text}")


if __name__ == "__main__":
    cli.run(main)
