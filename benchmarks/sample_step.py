"""How long guided sampling takes: python benchmarks/sample_step.py --config=configs/s2.py --torch

Each combination of --config, --dtype, --batch_size and --tolerance samples again and again with
random parameters and the config's guidance, in a process of its own. A row tells the seconds of
compiling, the median seconds and CPU seconds of a step, images a second at 250 steps (a
multiplication), model TFLOP a second, the share of the matmul peak measured in the same process,
and peak memory. --tolerance leaves guidance out where its weight is nearer to 1. --torch adds the
same in plain PyTorch (MDT v1, on the CPU), where both halves are evaluated in every step and which
alternates with ours. The JSON file --out has all of it.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable

import timing

from mdt_jax import cli

STEPS = 250  # of a picture


def prepare(spec: dict) -> tuple[Callable[[], object], dict]:
    """Guided sampling with mdt_jax and random parameters, compiled.

    spec: config, dtype, batch_size, num_steps, tolerance, and the sampler unless it is the
    config's. Returns the function that samples a batch, and the facts of it: the seconds of
    compiling and of the second call, network passes, operations, peaks.
    """
    from mdt_jax.runtime import backend

    backend.keep_freed_memory()
    import jax

    from mdt_jax.diffusion.options import SampleOptions, balanced_labels
    from mdt_jax.models.mdt import MDT, init_params
    from mdt_jax.sampling.generation import generate
    from mdt_jax.train import costs
    from mdt_jax.train.speed import memory_high_water

    config = timing.recipe(spec["config"], dtype=spec["dtype"])
    model = MDT.from_config(config)
    params = init_params(model, jax.random.key(0))
    options = dataclasses.replace(
        SampleOptions.from_config(config),
        sampler=spec.get("sampler", config.sample.sampler),
        num_steps=spec["num_steps"], guidance_skip_tolerance=spec["tolerance"],
    )  # fmt: skip
    labels = balanced_labels(spec["batch_size"], model.num_classes)

    def run():
        generate(model, params, labels, batch_size=len(labels), options=options)

    began = time.perf_counter()
    run()
    first, began = time.perf_counter() - began, time.perf_counter()
    run()
    second = time.perf_counter() - began
    passes = len(options.guided_evaluations()) + int(options.guided_evaluations().sum())
    facts = {
        "compile_seconds": first - second,
        "sample_seconds": second,
        "passes": passes,
        "flops": 2 * costs.pass_macs(model) * spec["batch_size"] * passes,
        "peak_flops": timing.peak_of_jax(spec["dtype"]) * jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
    }
    if jax.default_backend() != "cpu":
        facts["memory"] = memory_high_water()
    return run, facts


def of_torch(spec: dict) -> None:
    """The same in PyTorch."""
    import torch
    from torch_mdt import Sampler, TorchMDT

    from mdt_jax.models.mdt import MDT
    from mdt_jax.train import costs

    config = timing.recipe(spec["config"])
    model, size = MDT.from_config(config), spec["batch_size"]
    torch.manual_seed(0)
    guidance = config.sample.guidance_scale, config.sample.guidance_power
    autocast = spec["dtype"] == "bfloat16"
    sampler = Sampler(TorchMDT(model), spec["num_steps"], *guidance, autocast)
    labels = torch.arange(size) % model.num_classes

    def run():
        sampler.sample(torch.randn(size, model.in_channels, *model.input_size), labels)

    timing.serve(run, {
        "compile_seconds": 0.0,
        "passes": 2 * spec["num_steps"],
        "flops": 4 * costs.pass_macs(model) * size * spec["num_steps"],
        "peak_flops": timing.peak_of_torch(spec["dtype"]),
        "device": "cpu",
        "version": f"torch {torch.__version__}",
    })  # fmt: skip


KINDS = {"mdt_jax": lambda spec: timing.serve(*prepare(spec)), "PyTorch": of_torch}


def columns(rows: list[dict]) -> dict:
    def rate(row):
        return row["batch_size"] * row["num_steps"] / STEPS / row["seconds"]

    return timing.columns(rows, {
        "left out below": lambda row: f"{row['tolerance']:g}",
        "passes": lambda row: f"{row['passes']} in {row['num_steps']} steps",
        f"img/s, {STEPS} steps": lambda row: f"{rate(row):.3g}",
    })  # fmt: skip


def bench(argv: list[str]) -> list[dict]:
    """Read the flags, measure, print; returns the rows."""
    parser = cli.Parser(prog="python benchmarks/sample_step.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    for name, kind, default in (
        ("config", str, "configs/s2.py"),
        ("dtype", str, "float32"),
        ("batch_size", int, "4"),
        ("tolerance", float, "0"),
    ):
        add(f"--{name}", type=timing.several(kind), default=default, help="or several: a,b,c")
    add("--num_steps", type=int, default=12, help="of each sampling that is timed")
    add("--torch", action="store_true", help="the same work in PyTorch beside it")
    add("--rounds", type=int, default=3, help="samplings of each at least")
    add("--seconds", type=float, default=20, help="how long samplings go on")
    add("--out", default="runs/sample_step.json")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.one:
        spec = json.loads(args.one)
        KINDS[spec["kind"]](spec)
        return []
    rows = []
    lists = (getattr(args, name) for name in ("config", "dtype", "batch_size"))
    for config, dtype, size in itertools.product(*lists):
        spec = {"config": config, "dtype": dtype, "batch_size": size}
        spec["num_steps"] = args.num_steps
        specs = [{"kind": "mdt_jax", **spec, "tolerance": each} for each in args.tolerance]
        if args.torch:
            specs.insert(0, {"kind": "PyTorch", **spec, "tolerance": 0.0})
        rows += timing.in_turn(__file__, specs, args.rounds, args.seconds)
        timing.write(args.out, rows)
    print(timing.markdown(columns(rows), rows))
    return rows


if __name__ == "__main__":
    cli.run(bench)
