"""What a training step needs on each of many devices, without having them.

python benchmarks/scale.py

Compiles the step of a config ahead of time for meshes of simulated devices, and prints the memory
that the compiler plans for each of them as a table; scale.json has the same, and the seconds that
lowering and compiling took. Each mesh is a process of its own, because the number of devices is
fixed when JAX starts. Nothing is run, and none of that memory is needed.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError

# GiB of one device's memory, from the makers' data sheets.
CHIPS = {
    "TPU v5e, 16 GB": 16, "24 GB": 24, "TPU v4, v6e, 32 GB": 32, "A100, 40 GB": 40,
    "A100, H100, 80 GB": 80, "TPU v5p, 95 GB": 95,
}  # fmt: skip
ROOM = 0.9  # of it; the rest is the runtime's


def measure(path: str, changes: dict) -> dict:
    """In a process with its devices: GiB by kind, and seconds of lowering and compiling."""
    import jax

    from mdt_jax import config as configs
    from mdt_jax.models.mdt import MDT
    from mdt_jax.train import costs

    config = configs.load(path)
    config.mesh.fsdp = changes["fsdp"]
    config.train.update({name: changes[name] for name in ("remat", "dtype", "accumulate")})
    config.data.batch_size = changes["batch_size"]
    configs.validate(config, jax.device_count())
    began = time.perf_counter()
    memory = costs.step_memory(config, MDT.from_config(config), changes["optimized"])
    seconds = time.perf_counter() - began
    return {name: size / 2**30 for name, size in memory.items()} | {"seconds": seconds}


def in_its_own_process(path: str, devices: int, changes: dict) -> dict:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # or the seconds are of reading a file
    command = [sys.executable, __file__, f"--config={path}", f"--one={json.dumps(changes)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["for want of memory, perhaps"]
        why = said[-1].removeprefix("error: ")
        raise UserError(f"compiling for {devices} devices ended with {done.returncode}: {why}")
    return json.loads(done.stdout)


def smallest(total: float) -> str:
    """The smallest memory that a step fits."""
    return next((name for name, size in CHIPS.items() if total <= size * ROOM), "none of these")


def table(rows: list[dict]) -> str:
    lines = [
        "| devices | fsdp | remat | images each | state | temporary | all, GiB | fits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        total = row["state"] + row["batch"] + row["temporary"]
        each = row["batch_size"] // row["devices"]
        cells = [
            *(row["devices"], row["fsdp"], row["remat"], each),
            *(f"{size:.2f}" for size in (row["state"], row["temporary"], total)),
            smallest(total),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise UserError(f"{text!r} is not a list of numbers such as 8,256")
    return [int(part) for part in text.split(",")]


def bench(argv: list[str]) -> None:
    """Read the flags, compile, print."""
    parser = cli.Parser(prog="python benchmarks/scale.py", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/xl2.py", help="the recipe")
    parser.add_argument("--devices", default="8,256")
    parser.add_argument("--fsdp", default="1,8,64")
    parser.add_argument("--remat", default="none,dots,full")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch_size", default="256", help="over all devices")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument(
        "--optimized", action="store_true", help="compile as training does, which takes longer"
    )
    parser.add_argument("--out", default="runs/scale", help="folder of scale.json")
    parser.add_argument("--one", help="what a process of its own is to compile")
    options = parser.parse_args(argv[1:])
    if not pathlib.Path(options.config).is_file():
        raise UserError(f"config file '{options.config}' does not exist")
    if options.one:
        print(json.dumps(measure(options.config, json.loads(options.one))))
        return
    out, rows = pathlib.Path(options.out), []
    out.mkdir(parents=True, exist_ok=True)
    for devices, fsdp, remat, size in itertools.product(
        numbers(options.devices), numbers(options.fsdp), options.remat.split(","),
        numbers(options.batch_size),
    ):  # fmt: skip
        if devices % fsdp:
            continue
        changes = dict(
            fsdp=fsdp, remat=remat, dtype=options.dtype, batch_size=size,
            accumulate=options.accumulate, optimized=options.optimized,
        )  # fmt: skip
        print(
            f"{devices} devices, fsdp {fsdp}, remat {remat}, batch {size}",
            end=": ", file=sys.stderr, flush=True,
        )  # fmt: skip
        found = in_its_own_process(options.config, devices, changes)
        print(f"{found['seconds']:.0f} s", file=sys.stderr)
        rows.append({"devices": devices, **changes, **found})
        (out / "scale.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    cli.run(bench)
