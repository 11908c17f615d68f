"""What a step costs on a GPU or TPU, by compiling for one that is not there.

python benchmarks/aot.py --target=h100 --config=configs/xl2.py --batch_size=32 --remat=none

Compiles the training step of a config (--sample: a step of guided sampling) with the compiler of
the target, and counts in the program what its kernels read, write and multiply. Prints a table of
GiB, GB and kernels by kind, seconds of compiling, and the milliseconds and images a second that a
simple model predicts. The JSON file --out has all of it. Nothing is run.

h100, a100: `pip install -e ".[aot]"`; v5e, v5p: `pip install "jax[tpu]"`.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import timing

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.runtime.errors import UserError

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for. teraflops: dense bfloat16; terabytes: of memory a second.

    topology: what names several devices of a TPU; {n} is their number.
    """

    platform: str
    teraflops: float
    terabytes: float
    topology: str = ""


# From the makers' data sheets.
TARGETS = {
    "h100": Target("gpu", 989, 3.35),
    "a100": Target("gpu", 312, 2.04),
    "v5e": Target("tpu", 197, 0.82, "v5e"),
    "v5p": Target("tpu", 459, 2.77, "v5p"),
}

# The model of the predicted time: a kernel takes the longer of its arithmetic and its memory
# traffic, at these shares of the data sheet's peaks. On an H100 that is 650 TFLOP/s in matmuls,
# 150 in fused attention with a bias, and 2.7 TB/s.
MATMUL, FUSED_ATTENTION, MEMORY = 0.657, 0.152, 0.806

# The modules of a target's compiler, and how to install them.
WHEELS = {
    "gpu": ("jax_cuda13_plugin", 'pip install -e ".[aot]"'),
    "tpu": ("libtpu", 'pip install "jax[tpu]"'),
}


def devices(name: str, count: int) -> list:
    """`count` devices of a target that are not there."""
    import numpy as np
    from jax.experimental import topologies

    target = TARGETS[name]
    if target.platform == "gpu":
        _pretend_cudnn(name)
        text = (HERE / "targets" / f"{name}.txtpb").read_text()
        shape = f"1x{count}x1" if count > 1 else "1x1x1"
        found = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology=shape
        ).devices
    else:
        found = _tpu(target.topology, count)
    return list(np.array(found).reshape(-1)[:count])


def _tpu(name: str, count: int) -> list:
    from jax.experimental import topologies

    if name == "v5p":  # at least a host of four chips
        return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    if count == 1:
        one = {"chips_per_host_bounds": (1, 1, 1)}
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", **one).devices
    shape = {2: "2x2", 4: "2x2", 8: "2x4"}.get(count, f"{count // 4}x4")
    return topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{shape}").devices


def _pretend_cudnn(name: str) -> None:
    """JAX asks the GPU and its cuDNN what they can do; there is none to ask."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    hopper = name == "h100"
    cudnn.check_cudnn_version = lambda: 91200
    cudnn.check_compute_capability = lambda capability: hopper or float(capability) <= 8
    cudnn.is_cuda_compute_capability_equal = lambda capability: False


def compiled(spec: dict):
    """(the compiled program, model FLOP of a run, images of a run)."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from mdt_jax.models.mdt import MDT
    from mdt_jax.runtime import parallel
    from mdt_jax.train import costs
    from mdt_jax.train.optimizers import make_optimizer
    from mdt_jax.train.state import abstract_state
    from mdt_jax.train.step import compile_step

    config = timing.recipe(spec["config"], dtype=spec["dtype"], remat=spec["remat"])
    config.data.batch_size = spec["batch_size"]
    config.train.attention = spec["attention"]
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    grid = np.array(devices(spec["target"], spec["devices"])).reshape(-1, spec["fsdp"])
    mesh = Mesh(grid, parallel.AXES, axis_types=(AxisType.Auto, AxisType.Auto))
    if spec["sample"]:
        return _compiled_sampling(config, model, mesh), 0, spec["batch_size"]
    state = abstract_state(model, optimizer, mesh)
    program = compile_step(config, model, optimizer, state, mesh)
    return program, costs.training_flops(config, model) * spec["batch_size"], spec["batch_size"]


STEPS = 50  # of the loop of guided sampling that is compiled
PICTURE = 250  # steps of a picture, for images a second


def _compiled_sampling(config, model, mesh):
    """A loop of guided DDIM steps."""
    import jax
    import jax.numpy as jnp

    from mdt_jax.diffusion.options import SampleOptions
    from mdt_jax.models import xla
    from mdt_jax.models.mdt import init_params
    from mdt_jax.runtime import keys, parallel
    from mdt_jax.sampling import engine
    from mdt_jax.sampling.noise import Noise

    options = dataclasses.replace(
        SampleOptions.from_config(config), guidance_scale=1.0, num_steps=STEPS, sampler="ddim"
    ).clipping_for(False)
    model = xla.for_devices(model, mesh.devices.flat[0].platform, mesh.size)
    program = engine.Program(model, options)
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)

    def on(sharding, tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    def row(dtype):
        return jax.ShapeDtypeStruct((config.data.batch_size,), dtype)

    key = jax.eval_shape(keys.key, 0)
    params = on(whole, jax.eval_shape(lambda key: init_params(model, key), key))
    batch = engine.Batch(key, Noise(row(jnp.int32)), row(jnp.int32), row(jnp.float32))
    state = on(split, jax.eval_shape(engine.start, program, batch))
    rows = on(split, dataclasses.replace(batch, key=None))
    batch = dataclasses.replace(rows, key=on(whole, key))
    done = on(whole, jax.ShapeDtypeStruct((), jnp.int32))
    segment = engine.Segment(True, STEPS)
    lowered = engine.run_segment.lower(program, segment, params, batch, state, done)
    return lowered.compile()


def measure(spec: dict) -> dict:
    """In a process of its own: compile, and count."""
    import hlo
    import jax

    began, cpu = time.perf_counter(), time.process_time()
    program, flops, images = compiled(spec)
    took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    text, memory = program.as_text(), program.memory_analysis()
    if spec["hlo"]:
        pathlib.Path(spec["hlo"]).write_text(text)
    runs = STEPS if spec["sample"] else 1
    found = [dataclasses.replace(each, count=each.count / runs) for each in hlo.kernels(text)]
    by_kind = collections.defaultdict(lambda: {"gigabytes": 0.0, "kernels": 0.0, "ms": 0.0})
    for each in found:
        row = by_kind[each.kind]
        row["gigabytes"] += each.bytes * each.count / 1e9
        row["kernels"] += each.count
        row["ms"] += predicted(each, TARGETS[spec["target"]]) * each.count
    ms = sum(row["ms"] for row in by_kind.values())
    collected = [each for each in found if each.kind == "communication"]
    return {
        **spec, **took, "jax": jax.__version__, "kinds": dict(by_kind),
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "gigabytes": sum(row["gigabytes"] for row in by_kind.values()),
        "kernels": sum(row["kernels"] for row in by_kind.values()),
        "collectives": collectives(collected),
        "model_flops": flops, "ms": ms,
        "images_per_second": images / ms * 1e3 / (PICTURE if spec["sample"] else 1),
    }  # fmt: skip


def collectives(found: list) -> dict[str, float]:
    """GB that each kind of collective delivers, by "operation dtype"."""
    import hlo

    total = collections.Counter()
    for each in found:
        dtype, _ = hlo.shapes(each.type)[-1]
        total[f"{each.opcode.removesuffix('-start')} {dtype}"] += each.bytes / 2 * each.count / 1e9
    return dict(total)


def predicted(kernel, target: Target) -> float:
    """Milliseconds of one run of a kernel."""
    fused = kernel.opcode == "custom-call" and kernel.kind == "attention"
    rate = (FUSED_ATTENTION if fused else MATMUL) * target.teraflops * 1e12
    return 1e3 * max(kernel.flops / rate, kernel.bytes / (MEMORY * target.terabytes * 1e12))


def in_its_own_process(spec: dict) -> dict:
    """Compilers of several targets do not share a process, and libtpu not even a machine."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # or the seconds are of reading a file
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    }  # fmt: skip
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, __file__, f"--one={json.dumps(spec)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["for want of memory, perhaps"]
        raise UserError(f"compiling for {spec['target']}: {said[-1].removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def check_wheels(target: str) -> None:
    """Raise UserError where the compiler of a target is not installed."""
    module, install = WHEELS[TARGETS[target].platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"the compiler for {target} is not installed: {install}")
    if TARGETS[target].platform == "gpu":
        own, compiler = map(importlib.metadata.version, ("jax", "jax-cuda13-plugin"))
        if own != compiler:
            raise UserError(
                f"the compiler for {target} is of JAX {compiler}, and JAX is {own}: "
                f"pip install jax-cuda13-plugin=={own}"
            )


def report(row: dict) -> str:
    """A row's kernels by kind, as a table."""
    target = TARGETS[row["target"]]
    what = "a step of sampling" if row["sample"] else "a training step"
    kinds = sorted(row["kinds"].items(), key=lambda item: -item[1]["gigabytes"])
    lines = [
        f"{pathlib.Path(row['config']).stem}, {what} of {row['batch_size']} images, {row['dtype']}"
        f", remat {row['remat']}, {row['devices']} × {row['target']}, jax {row['jax']}",
        f"model: matmuls {MATMUL * target.teraflops:.0f} TFLOP/s, fused attention "
        f"{FUSED_ATTENTION * target.teraflops:.0f} TFLOP/s, memory "
        f"{MEMORY * target.terabytes:.2f} TB/s",
        "",
        "| kernels of | GB | kernels | predicted ms |",
        "| --- | --- | --- | --- |",
    ]
    for name, kind in kinds:
        cells = f"{kind['gigabytes']:.2f}", f"{kind['kernels']:,.0f}", f"{kind['ms']:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, gigabytes in sorted(row["collectives"].items()):
        lines.append(f"{name}: {gigabytes:.2f} GB delivered to a device")
    return "\n".join(lines) + "\n"


COLUMNS = {
    "": lambda row: f"{pathlib.Path(row['config']).stem}, {row['target']}",
    "batch": lambda row: row["batch_size"],
    "remat": lambda row: row["remat"],
    "GiB, arguments + temporary": lambda row: (
        f"{row['arguments_gib']:.1f} + {row['temporary_gib']:.1f}"
    ),
    "GB": lambda row: f"{row['gigabytes']:.4g}",
    "kernels": lambda row: f"{row['kernels']:,.0f}",
    "compiling, CPU s": lambda row: f"{row['cpu_seconds']:.0f}",
    "predicted ms": lambda row: f"{row['ms']:.4g}",
    "predicted img/s": lambda row: f"{row['images_per_second']:.4g}",
}  # fmt: skip


def bench(argv: list[str]) -> list[dict]:
    """Read the flags, compile, print; returns the rows."""
    parser = cli.Parser(prog="python benchmarks/aot.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    for name, kind, default in (
        ("target", str, "h100"),
        ("config", str, "configs/xl2.py"),
        ("dtype", str, "bfloat16"),
        ("batch_size", int, "32"),
        ("remat", str, "none"),
        ("attention", str, "auto"),
    ):
        add(f"--{name}", type=timing.several(kind), default=default, help="or several: a,b,c")
    add("--sample", action="store_true", help="a step of guided sampling, not of training")
    add("--devices", type=int, default=1)
    add("--fsdp", type=int, default=1, help="of the devices, how many share the parameters")
    add("--hlo", default="", help="write the optimised HLO of the last program to this file")
    add("--out", default="runs/aot.json")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return []
    for path, attention in itertools.product(args.config, args.attention):
        config = timing.recipe(path)
        config.train.attention = attention
        configs.validate(config, args.devices)
    for target in args.target:
        if target not in TARGETS:
            raise UserError(f"unknown target '{target}'; choose from {', '.join(TARGETS)}")
        check_wheels(target)
    rows, names = [], ("target", "config", "dtype", "batch_size", "remat", "attention")
    for values in itertools.product(*(getattr(args, name) for name in names)):
        spec = dict(zip(names, values, strict=True))
        spec |= {name: getattr(args, name) for name in ("sample", "devices", "fsdp", "hlo")}
        print(" ".join(map(str, values)), file=sys.stderr, flush=True)
        rows.append(in_its_own_process(spec))
        print(report(rows[-1]))
        timing.write(args.out, rows)
    print(timing.markdown(COLUMNS, rows))
    return rows


if __name__ == "__main__":
    cli.run(bench)
