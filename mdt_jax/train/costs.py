"""What a model costs: parameters, multiply-accumulates, memory, and what a chip can do."""

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from ml_collections import ConfigDict

from mdt_jax.models.masking import keep_length
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime import keys, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import TrainState, abstract_state
from mdt_jax.train.step import compile_step

TRAINING_ONLY = ("side_interpolater", "mask_token")

# Dense bfloat16 TFLOP/s of one device as JAX counts them, from the makers' data sheets; the first
# name that is among the words of `device_kind` counts. A TPU v2 or v3 is one of a chip's two cores.
PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65,
    "TPU v6": 918, "TPU v5p": 459, "TPU v5 lite": 197, "TPU v5": 459, "TPU v4 lite": 138,
    "TPU v4": 275, "TPU v3": 61.5, "TPU v2": 23,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """The most operations that a device does in a second in bfloat16; None where not known."""
    return next(
        (peak * 1e12 for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_kind)),
        None,
    )


def parameter_counts(model: MDT) -> tuple[int, int]:
    """(all parameters, those that sampling needs)."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), keys.key(0))
    sizes = {name: sum(a.size for a in jax.tree.leaves(part)) for name, part in shapes.items()}
    total = sum(sizes.values())
    return total, total - sum(sizes.get(name, 0) for name in TRAINING_ONLY)


def inner_jaxprs(params: dict[str, Any]) -> Iterator[jax.extend.core.Jaxpr]:
    """The jaxprs among an equation's parameters, such as a scan's body or a cond's branches."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, jax.extend.core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jax.extend.core.Jaxpr):
                yield item


def _shape(variable) -> tuple[int, ...]:
    """Of an array in a jaxpr."""
    return variable.aval.shape


def _macs(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Multiply-accumulates of all matrix products; a loop's as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += math.prod(out) * math.prod(left[axis] for axis in contracted)
        inner = sum(_macs(sub) for sub in inner_jaxprs(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def pass_macs(model: MDT, kept: int | None = None) -> int:
    """Multiply-accumulates of one image's forward pass; kept: tokens the masked pass keeps."""
    params = jax.eval_shape(lambda key: init_params(model, key), keys.key(0))
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


def training_flops(config: ConfigDict, model: MDT) -> int:
    """Operations that training takes for each image: both passes, forward and backward.

    A multiply-accumulate is two of them, and the backward pass costs two forward passes; what is
    recomputed is not counted, and of a drawn mask ratio the mean.
    """
    lengths, macs = kept_lengths(config, model.num_tokens), 0
    if config.mask.passes != "masked":
        macs += pass_macs(model)
    if lengths is not None:
        macs += sum(pass_macs(model, kept) for kept in lengths) // 2
    return 6 * macs


def step_memory(config: ConfigDict, model: MDT, optimized: bool = False) -> dict[str, int]:
    """Bytes on each device: the training state, the batch, and what a step needs on top.

    optimized: compile as training does; it takes longer and plans the same buffers. Raises
    UserError where the compiler does not tell.
    """
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    optimizer = make_optimizer(config.optim)
    state = abstract_state(model, optimizer, mesh)
    # The buffers are planned before LLVM is asked to optimise, which takes most of the time.
    options = None if optimized else {"xla_backend_optimization_level": 0}
    memory = compile_step(config, model, optimizer, state, mesh, options).memory_analysis()
    if memory is None:
        raise UserError("the compiler for these devices does not tell what memory a step needs")
    held = _held(state)
    # The new state takes the place of the old one; the rest of the output is metrics.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "state": held,
        "batch": memory.argument_size_in_bytes - held,
        "temporary": memory.temp_size_in_bytes + new,
    }


def _held(state: TrainState) -> int:
    """Bytes of an abstract state on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def check_memory(config: ConfigDict, model: MDT, state: TrainState) -> None:
    """Raise UserError where the least that training keeps is more than all memory of a device.

    Of shapes alone, before any memory is asked for. state: as of `abstract_state`. CPU devices
    share the machine's memory. The least is the state, the images of a batch, and the input of each
    block.
    """
    data, parts = config.data, config.train.accumulate
    each = data.batch_size // jax.device_count()
    numbers = -(-each // parts) * model.num_tokens * model.hidden_size * model.depth
    least = {
        "parameters, EMA and optimiser": _held(state),
        "the images of a batch": each * data.image_size**2 * data.channels,
        "the inputs of the blocks": numbers * jnp.dtype(model.dtype).itemsize,
    }
    device = jax.local_devices()[0]
    room = (device.memory_stats() or {}).get("bytes_limit")
    if room is None:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = pages // jax.local_device_count()
    if sum(least.values()) > room:
        parts_ = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in least.items())
        raise UserError(
            f"training takes at least {sum(least.values()) / 2**30:,.1f} GiB on each device, which "
            f"has {room / 2**30:.1f} ({parts_}): a smaller network or data.batch_size, or more "
            "devices and mesh.fsdp"
        )
