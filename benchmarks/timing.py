"""What the benches of speed share: work in processes of its own, timed in turn."""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from mdt_jax.runtime.errors import UserError


def several(kind: Callable[[str], object]) -> Callable[[str], list]:
    """Reads "a,b,c"."""

    def several(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    return several


def recipe(path: str, **changes):
    """The config of a recipe, FILE.py or FILE.py:VARIANT, on latents that are read from nowhere.

    changes: of its `train` fields.
    """
    from mdt_jax import config as configs

    file, _, variant = path.partition(":")
    config = configs.load(file, variant)
    if config.vae.path != "identity":
        config.data.update(name="latents", path="")
    config.train.update(changes)
    return config


def matmul_peak(multiply: Callable[[], object], side: int) -> float:
    """FLOP/s of a call that multiplies two square matrices; the best of ten."""
    multiply()
    took = []
    for _ in range(10):
        began = time.perf_counter()
        multiply()
        took.append(time.perf_counter() - began)
    return 2 * side**3 / min(took)


def peak_of_jax(dtype: str) -> float:
    """FLOP/s of a large matmul on one device.

    The matrices are random, because a GPU multiplies constant ones up to 13 % faster.
    """
    import jax

    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    return matmul_peak(lambda: multiply(x, x).block_until_ready(), side)


def peak_of_torch(dtype: str) -> float:
    """FLOP/s of a large matmul in PyTorch on the CPU."""
    import torch

    x = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    return matmul_peak(lambda: x @ x, 2048)


def serve(run: Callable[[], object], facts: dict) -> None:
    """The work of a process of its own: tell the facts, then run once for each line asked."""
    run()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        run()
        print(json.dumps([time.perf_counter() - began, time.process_time() - cpu]), flush=True)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, flush=True)


class Worker:
    """A process in which a script does the work of `spec`."""

    def __init__(self, script: str, spec: dict):
        self.spec, self.took = spec, []
        command = [sys.executable, script, f"--one={json.dumps(spec)}"]
        print(" ".join(map(str, spec.values())), file=sys.stderr, flush=True)
        pipe, self._said = subprocess.PIPE, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._said, text=True
        )
        self.facts = json.loads(self._answer())

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or ["for want of memory, perhaps"]
            raise UserError(f"{self.spec}: {said[-1].removeprefix('error: ')}")
        return line

    def step(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.took.append(json.loads(self._answer()))

    def result(self) -> dict:
        """What was told and measured, once the process has ended."""
        self._process.stdin.close()
        memory = int(self._answer())
        self._process.wait()
        wall, cpu = zip(*self.took, strict=True)
        low, middle, high = statistics.quantiles(wall, n=4, method="inclusive")
        return {
            **self.spec, "memory": memory, **self.facts, "steps": len(wall), "seconds": middle,
            "quartiles": [low, high], "cpu_seconds": statistics.median(cpu), "took": self.took,
        }  # fmt: skip


def in_turn(script: str, specs: list[dict], rounds: int, seconds: float) -> list[dict]:
    """Run the work of several processes step by step in turn, so that all meet the same weather.

    rounds: how many turns at least; they go on for so many seconds. Each row is what a process was
    asked for, told and took; where one is PyTorch's, "ratio" is the CPU time as a share of its.
    """
    workers, began = [Worker(script, spec) for spec in specs], time.perf_counter()
    while len(workers[0].took) < rounds or time.perf_counter() - began < seconds:
        for worker in workers:
            worker.step()
    rows = [worker.result() for worker in workers]
    other = next((row for row in rows if row["kind"] == "PyTorch"), None)
    for row in rows if other else ():
        pairs = zip(row["took"], other["took"], strict=True)
        row["ratio"] = statistics.median(ours[1] / theirs[1] for ours, theirs in pairs)
    return rows


def markdown(columns: dict[str, Callable[[dict], str]], rows: list[dict]) -> str:
    """A table; columns: head → the text of a row's cell."""
    lines = [[str(cell(row)) for cell in columns.values()] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(rows: list[dict], own: dict[str, Callable[[dict], str]]) -> dict:
    """Those of any bench, with its own in the middle; the ratio where PyTorch was measured."""

    def rate(row):
        return row["flops"] / row["seconds"]

    return {
        "": lambda row: f"{row['kind']}, {pathlib.Path(row['config']).stem}",
        "dtype": lambda row: row["dtype"],
        "batch": lambda row: row["batch_size"],
        "compile s": lambda row: f"{row['compile_seconds']:.0f}",
        "s (quartiles)": lambda row: (
            f"{row['seconds']:.3g} ({row['quartiles'][0]:.3g}–{row['quartiles'][1]:.3g})"
        ),
        "CPU s": lambda row: f"{row['cpu_seconds']:.3g}",
        **own,
        "TFLOP/s": lambda row: f"{rate(row) / 1e12:.3g}",
        "of the peak": lambda row: f"{rate(row) / row['peak_flops']:.0%}",
        "GB": lambda row: f"{row['memory'] / 1e9:.1f}",
        **({"CPU, to PyTorch's": lambda row: f"{row['ratio']:.2f}"} if "ratio" in rows[0] else {}),
    }


def write(path: str, rows: list[dict]) -> None:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    what = {"cores": os.cpu_count(), "python": sys.version.split()[0]}
    pathlib.Path(path).write_text(json.dumps({**what, "rows": rows}, indent=1) + "\n")
