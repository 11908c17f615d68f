"""What a config costs: python -m mdt_jax.info --config=configs/v2_xl2.py

Prints parameters, multiply-accumulates of both passes, the tokens the masked pass keeps, the memory
of a training step as the compiler for this machine's devices plans it, and what machine that is.
Nothing is trained, and none of that memory is needed.
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
    """What is printed, line by line."""
    model = MDT.from_config(config)
    total, sampling = costs.parameter_counts(model)
    full = costs.pass_macs(model)
    lines = {
        "parameters": f"{total:,} ({sampling:,} without the training-only part)",
        "full pass": f"{full / 1e9:.2f} GMAC an image",
    }
    lengths = costs.kept_lengths(config, model.num_tokens)
    if lengths is not None:
        masked = [costs.pass_macs(model, kept) for kept in lengths]
        lines["masked pass"] = f"{_range(f'{macs / 1e9:.2f}' for macs in masked)} GMAC an image"
        lines["kept lengths"] = f"{_range(map(str, lengths))} of {model.num_tokens} tokens" + (
            ", drawn for each step" if lengths[0] < lengths[1] else ""
        )
    lines["training"] = f"{costs.training_flops(config, model) / 1e12:.2g} TFLOP an image"
    memory = costs.step_memory(config, model)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    devices = jax.device_count()
    lines["memory of a step"] = (
        f"{sum(memory.values()) / 2**30:.2f} GiB on each device for a batch of "
        f"{config.data.batch_size // devices} ({parts})"
    )
    lines["this machine"] = (
        f"{devices} × {jax.devices()[0].device_kind}, JAX {jax.__version__}, "
        f"Python {platform.python_version()}"
    )
    return lines


def _range(values) -> str:
    fewest, most = values
    return fewest if fewest == most else f"{fewest}–{most}"


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
        log("model.num_classes is -1, and no data is read: counted as 0")
        config.model.num_classes = 0
    log("compiling a training step, to see what it needs …")
    for name, text in report(config).items():
        print_result(f"{name:<17}{text}")


if __name__ == "__main__":
    cli.run(main)
