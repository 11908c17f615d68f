"""What a config costs: python -m mdt_jax.info --config=configs/v2_xl2.py

Prints parameters, multiply-accumulates of both passes, the tokens the masked pass keeps, the memory
of a training step as the compiler for this machine's devices plans it, and what machine that is.
Nothing is trained, and none of that memory is needed.
"""

import math
import platform
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
from ml_collections import ConfigDict

from mdt_jax import cli, parallel
from mdt_jax import config as configs
from mdt_jax.models.masking import keep_length
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state
from mdt_jax.train.step import compile_step

TRAINING_ONLY = ("side_interpolater", "mask_token")


def parameter_counts(model: MDT) -> tuple[int, int]:
    """(all parameters, those that sampling needs)."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    sizes = {name: sum(a.size for a in jax.tree.leaves(part)) for name, part in shapes.items()}
    total = sum(sizes.values())
    return total, total - sum(sizes.get(name, 0) for name in TRAINING_ONLY)


def _macs(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Multiply-accumulates of all matrix products; a loop's as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = equation.outvars[0].aval.shape
            total += math.prod(out) * math.prod(left[axis] for axis in contracted)
        inner = sum(_macs(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def pass_macs(model: MDT, kept: int | None = None) -> int:
    """Multiply-accumulates of one image's forward pass; kept: tokens the masked pass keeps."""
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *model.input_size, model.in_channels), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    ids = None if kept is None else jax.ShapeDtypeStruct((1, kept), jnp.int32)

    def forward(params, x, t, y, ids):
        return model.apply({"params": params}, x, t, y, ids)

    return _macs(jax.make_jaxpr(forward)(params, x, number, number, ids).jaxpr)


def kept_lengths(config: ConfigDict, num_tokens: int) -> tuple[int, int] | None:
    """(fewest, most) tokens that a masked pass keeps; None where there is no masked pass."""
    mask = config.mask
    if mask.passes == "full":
        return None
    fewest = keep_length(num_tokens, max(mask.ratio, mask.ratio_max))
    return fewest, keep_length(num_tokens, mask.ratio)


def step_memory(config: ConfigDict, model: MDT) -> dict[str, int]:
    """Bytes on each device: the training state, the batch, and what a step needs on top."""
    mesh, optimizer = parallel.data_mesh(), make_optimizer(config.optim)
    state = abstract_state(model, optimizer, parallel.replicated(mesh))
    # The buffers are planned before LLVM is asked to optimise, which takes most of the time.
    quick = {"xla_backend_optimization_level": 0}
    memory = compile_step(config, model, optimizer, state, mesh, quick).memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # The new state takes the place of the old one; the rest of the output is metrics.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "state": held,
        "batch": memory.argument_size_in_bytes - held,
        "temporary": memory.temp_size_in_bytes + new,
    }


def report(config: ConfigDict) -> dict[str, str]:
    """What is printed, line by line."""
    model = MDT.from_config(config)
    total, sampling = parameter_counts(model)
    full = pass_macs(model)
    lines = {
        "parameters": f"{total:,} ({sampling:,} without the training-only part)",
        "full pass": f"{full / 1e9:.2f} GMAC an image",
    }
    lengths, trained = kept_lengths(config, model.num_tokens), [full]
    if config.mask.passes == "masked":
        trained = []
    if lengths is not None:
        masked = [pass_macs(model, kept) for kept in lengths]
        trained.append(sum(masked) / 2)
        lines["masked pass"] = f"{_range(f'{macs / 1e9:.2f}' for macs in masked)} GMAC an image"
        lines["kept lengths"] = f"{_range(map(str, lengths))} of {model.num_tokens} tokens" + (
            ", drawn for each step" if lengths[0] < lengths[1] else ""
        )
    # A multiply-accumulate is two operations, and the backward pass costs two forward passes.
    lines["training"] = f"{6 * sum(trained) / 1e12:.2g} TFLOP an image"
    memory = step_memory(config, model)
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


def main(argv: list[str]) -> None:
    """Parse the flags and print."""
    usage = (
        "usage: python -m mdt_jax.info --config=configs/v2_xl2.py [--config.field=value …]\n"
        "Fields and defaults: mdt_jax/config.py"
    )
    config, _ = cli.parse_config(argv, usage)
    configs.validate(config, jax.device_count())
    print("compiling a training step, to see what it needs …", file=sys.stderr)
    for name, text in report(config).items():
        print(f"{name:<17}{text}")


if __name__ == "__main__":
    cli.run(main)
