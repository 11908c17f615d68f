"""The costs of a model: parameters, multiply-accumulates and memory; the peak of a device."""

import functools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from ml_collections import ConfigDict

from mdt_jax.models import attend
from mdt_jax.models.masking import keep_length
from mdt_jax.models.mdt import MDT, image_sides, init_params
from mdt_jax.runtime import keys, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import TrainState, abstract_state
from mdt_jax.train.step import compile_step

TRAINING_ONLY = ("side_interpolater", "mask_token")

# Dense bfloat16 TFLOP/s of one device as JAX counts devices, from the vendors' data sheets: of the
# first name in `device_kind`. A TPU v2 or v3 device is one of a chip's two cores.
PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65,
    "TPU v6": 918, "TPU v5p": 459, "TPU v5 lite": 197, "TPU v5": 459, "TPU v4 lite": 138,
    "TPU v4": 275, "TPU v3": 61.5, "TPU v2": 23,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """A device's peak bfloat16 operations per second; None if unknown."""
    for name, peak in PEAKS.items():
        if re.search(rf"\b{name}\b", device_kind):
            return peak * 1e12
    return None


# Parameters and multiply-accumulates.


def _param_shapes(model: MDT) -> dict:
    return jax.eval_shape(lambda key: init_params(model, key), keys.key(0))


def parameter_counts(model: MDT) -> tuple[int, int]:
    """(all parameters, the parameters that sampling needs)."""
    shapes = _param_shapes(model)
    sizes = {name: sum(a.size for a in jax.tree.leaves(part)) for name, part in shapes.items()}
    total = sum(sizes.values())
    return total, total - sum(sizes.get(name, 0) for name in TRAINING_ONLY)


def inner_jaxprs(params: dict[str, Any]) -> Iterator[jax.extend.core.Jaxpr]:
    """The jaxprs among an equation's parameters, for example a scan's body or cond's branches."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, jax.extend.core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jax.extend.core.Jaxpr):
                yield item


def _shape(variable) -> tuple[int, ...]:
    return variable.aval.shape


def _macs(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Multiply-accumulates of all matmuls; a loop's body counts as often as it runs.

    XLA's own cost analysis counts a scanned block once.
    """
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
    """Multiply-accumulates of one image's forward pass; kept: the masked pass's kept tokens.

    Attention counts as among the kept tokens, although devices compute it over the whole grid.
    """
    params = _param_shapes(model)
    model = model.clone(ops=model.ops._replace(attend=functools.partial(_attend_kept, kept)))
    x = jax.ShapeDtypeStruct((1, *model.input_size, model.in_channels), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    ids = None if kept is None else jax.ShapeDtypeStruct((1, kept), jnp.int32)

    def forward(params, x, t, y, ids):
        return model.apply({"params": params}, x, t, y, ids)

    return _macs(jax.make_jaxpr(forward)(params, x, number, number, ids).jaxpr)


def _attend_kept(kept, q, k, v, bias, visible):
    length = q.shape[1] if visible is None else kept
    out = attend.plain(*(each[:, :length] for each in (q, k, v)))
    return jnp.pad(out, [(0, 0), (0, q.shape[1] - length), (0, 0), (0, 0)])


def kept_lengths(config: ConfigDict, num_tokens: int) -> tuple[int, int] | None:
    """(fewest, most) tokens that the masked pass keeps; None without a masked pass."""
    mask = config.mask
    if mask.passes == "full":
        return None
    fewest = keep_length(num_tokens, max(mask.ratio, mask.ratio_max))
    return fewest, keep_length(num_tokens, mask.ratio)


def training_flops(config: ConfigDict, model: MDT) -> int:
    """Operations of training per image: both passes, forward and backward.

    A multiply-accumulate is two operations; the backward pass costs two forward passes.
    Recomputation is not counted. Of a drawn mask ratio, the mean of the extremes counts.
    """
    lengths, macs = kept_lengths(config, model.num_tokens), 0
    if config.mask.passes != "masked":
        macs += pass_macs(model)
    if lengths is not None:
        macs += sum(pass_macs(model, kept) for kept in lengths) // 2
    return 6 * macs


# Memory.


def step_memory(config: ConfigDict, model: MDT, optimized: bool = False) -> dict[str, int]:
    """Bytes per device of a training step: "state", "batch" and "temporary".

    optimized: compile as for training; this takes longer and plans the same buffers. Raises
    UserError if the compiler has no memory analysis.
    """
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    optimizer = make_optimizer(config.optim)
    state = abstract_state(model, optimizer, mesh)
    # XLA plans buffers before LLVM optimises, which takes most of the time.
    options = None if optimized else {"xla_backend_optimization_level": 0}
    memory = compile_step(config, model, optimizer, state, mesh, options).memory_analysis()
    if memory is None:
        raise UserError("the compiler for these devices does not report the memory of a step")
    state_size = _state_size(state)
    # The new state takes the place of the old one; the rest of the output is metrics.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "state": state_size,
        "batch": memory.argument_size_in_bytes - state_size,
        "temporary": memory.temp_size_in_bytes + new,
    }


def _state_size(state: TrainState) -> int:
    """Bytes of an abstract state on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def check_memory(config: ConfigDict, model: MDT, state: TrainState) -> None:
    """Raise UserError if training's lower bound exceeds the memory of a device.

    The bound is the state, the images of a batch and the input of each block. It is computed from
    shapes, before memory is allocated. state: as `abstract_state` returns it. CPU devices share the
    machine's memory.
    """
    data = config.data
    images = data.batch_size // jax.device_count()
    microbatch = -(-images // config.train.accumulate)
    activations = microbatch * model.num_tokens * model.hidden_size * model.depth
    sizes = {
        "parameters, EMA and optimiser": _state_size(state),
        "the images of a batch": images * math.prod(image_sides(config)) * data.channels,
        "the inputs of the blocks": activations * jnp.dtype(model.dtype).itemsize,
    }
    least, available = sum(sizes.values()), _device_memory()
    if least > available:
        parts = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in sizes.items())
        raise UserError(
            f"training takes at least {least / 2**30:,.1f} GiB on each device, which has "
            f"{available / 2**30:.1f} ({parts}): choose a smaller network or data.batch_size, or "
            "use more devices and mesh.fsdp"
        )


def _device_memory() -> int:
    """Bytes of memory of one device; of a CPU device, its share of the machine's."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return limit
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // jax.local_device_count()
