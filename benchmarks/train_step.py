"""How long a training step takes: python benchmarks/train_step.py --config=configs/s2.py --torch

Each combination of --config, --dtype, --batch_size and --remat compiles its step ahead of time in a
process of its own and runs it on random data. A row tells the seconds of compiling, the median step
with its quartiles, CPU seconds, images and model TFLOP a second, the share of the matmul peak
measured in the same process, and peak memory. --torch adds the same work in plain PyTorch (MDT v1,
on the CPU), whose steps alternate with ours. The JSON file --out has all of it.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable

import timing

from mdt_jax import cli

# The `train` fields of a config that a spec may set.
TRAIN_FIELDS = ("dtype", "remat", "precision", "attention")


def prepare(spec: dict) -> tuple[Callable[[], dict], dict]:
    """The training step of mdt_jax on a random batch, compiled.

    spec: config, batch_size and any of TRAIN_FIELDS. Returns the function that runs one step and
    returns its metrics, and the facts of the step: seconds of compiling, operations, peaks.
    """
    from mdt_jax.runtime import backend

    backend.keep_freed_memory()
    import jax
    import numpy as np

    from mdt_jax.models.mdt import MDT
    from mdt_jax.runtime import parallel
    from mdt_jax.train import costs
    from mdt_jax.train.optimizers import make_optimizer
    from mdt_jax.train.speed import memory_high_water
    from mdt_jax.train.state import abstract_state, init_state
    from mdt_jax.train.step import batch_shapes, compile_step

    changes = {name: spec[name] for name in TRAIN_FIELDS if name in spec}
    config = timing.recipe(spec["config"], **changes)
    config.data.batch_size = spec["batch_size"]
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    abstract = abstract_state(model, optimizer, mesh)
    began = time.perf_counter()
    step = compile_step(config, model, optimizer, abstract, mesh)
    compiling = time.perf_counter() - began
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(init_state, static_argnums=(0, 1), out_shardings=shardings)
    state = init(model, optimizer, jax.random.key(0))
    split, random = parallel.split_batch(mesh), np.random.default_rng(0)
    batch = {
        name: parallel.put(random.integers(0, 2, leaf.shape).astype(leaf.dtype), split)
        for name, leaf in batch_shapes(config, model, split).items()
    }
    key, rate = parallel.put(
        (jax.random.key(1), np.float32(config.optim.lr)), parallel.replicated(mesh)
    )

    def run():
        nonlocal state
        state, metrics = step(state, batch, key, rate)
        return jax.block_until_ready((state, metrics))[1]

    facts = {
        "compile_seconds": compiling,
        "flops": costs.training_flops(config, model) * spec["batch_size"],
        "peak_flops": timing.peak_of_jax(spec["dtype"]) * mesh.size,
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
    }
    if jax.default_backend() != "cpu":
        run()
        facts["memory"] = memory_high_water()
    return run, facts


def of_torch(spec: dict) -> None:
    """The same work in PyTorch."""
    import torch
    from torch_mdt import TorchMDT, Trainer

    from mdt_jax.models.mdt import MDT
    from mdt_jax.train import costs

    config = timing.recipe(spec["config"])
    model, size = MDT.from_config(config), spec["batch_size"]
    torch.manual_seed(0)
    how = config.optim.lr, config.optim.ema_decay, spec["dtype"] == "bfloat16"
    trainer = Trainer(TorchMDT(model), *how)
    shape = (size, model.in_channels, *model.input_size)
    kept = costs.kept_lengths(config, model.num_tokens)[1]

    def run():
        x0, t = torch.randn(shape), torch.randint(0, config.diffusion.steps, (size,))
        labels = [torch.randint(0, model.num_classes, (size,)) for _ in range(2)]
        ids = torch.rand(size, model.num_tokens).argsort(1)[:, :kept]
        trainer.step(x0, t, [torch.randn(shape) for _ in range(2)], labels, ids)

    timing.serve(run, {
        "compile_seconds": 0.0,
        "flops": costs.training_flops(config, model) * size,
        "peak_flops": timing.peak_of_torch(spec["dtype"]),
        "device": "cpu",
        "version": f"torch {torch.__version__}",
    })  # fmt: skip


KINDS = {"mdt_jax": lambda spec: timing.serve(*prepare(spec)), "PyTorch": of_torch}


def columns(rows: list[dict]) -> dict:
    return timing.columns(rows, {
        "remat": lambda row: row["remat"],
        "img/s": lambda row: f"{row['batch_size'] / row['seconds']:.3g}",
    })  # fmt: skip


def bench(argv: list[str]) -> list[dict]:
    """Read the flags, measure, print; returns the rows."""
    parser = cli.Parser(prog="python benchmarks/train_step.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    for name, kind, default in (
        ("config", str, "configs/s2.py"),
        ("dtype", str, "float32"),
        ("batch_size", int, "16"),
        ("remat", str, "none"),
    ):
        add(f"--{name}", type=timing.several(kind), default=default, help="or several: a,b,c")
    add("--torch", action="store_true", help="the same work in PyTorch beside it")
    add("--rounds", type=int, default=5, help="steps of each at least")
    add("--seconds", type=float, default=20, help="how long steps go on")
    add("--out", default="runs/train_step.json")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.one:
        spec = json.loads(args.one)
        KINDS[spec["kind"]](spec)
        return []
    rows = []
    lists = (getattr(args, name) for name in ("config", "dtype", "batch_size", "remat"))
    for config, dtype, size, remat in itertools.product(*lists):
        spec = {"config": config, "dtype": dtype, "batch_size": size, "remat": remat}
        kinds = ["PyTorch", "mdt_jax"] if args.torch else ["mdt_jax"]
        specs = [{"kind": kind, **spec} for kind in kinds]
        rows += timing.in_turn(__file__, specs, args.rounds, args.seconds)
        timing.write(args.out, rows)
    print(timing.markdown(columns(rows), rows))
    return rows


if __name__ == "__main__":
    cli.run(bench)
