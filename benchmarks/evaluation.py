"""What the measures cost on this machine's CPU: python benchmarks/evaluation.py

Features as an Inception gives them are drawn at random (not below 0, correlated), those of 50,000
samples and as many real images of 2,048 each, and go through what mdt_jax.evaluate does with them.
Prints seconds and the process's peak memory as a table; evaluation.json has the same.
--references=10000 is the size of ADM's reference files.
"""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from mdt_jax import cli
from mdt_jax.evaluation import metrics
from mdt_jax.evaluation.features import SLICE


def drawn(count: int, size: int, seed: int) -> np.ndarray:
    """[count, size] float32."""
    mix = np.random.default_rng(9).standard_normal((size, size), np.float32) / np.sqrt(size)
    return np.maximum(
        np.random.default_rng(seed).standard_normal((count, size), np.float32) @ mix + 0.4, 0
    )


def in_slices(features: np.ndarray) -> metrics.Gaussian:
    moments = metrics.Moments()
    for start in range(0, len(features), SLICE):
        moments.add(features[start : start + SLICE])
    return moments.gaussian()


def timed(name: str, function: Callable, *arguments) -> tuple[object, dict]:
    """(what the function gives, a row of the table)."""
    began, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    seconds = time.perf_counter() - began, time.process_time() - cpu
    # The high-water mark so far: kilobytes on Linux, bytes on a Mac.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 1e9 if sys.platform == "darwin" else 1e6
    return result, {"name": name, "seconds": seconds[0], "cpu_seconds": seconds[1], "peak_gb": peak}


def bench(argv: list[str]) -> None:
    parser = cli.Parser(prog="python benchmarks/evaluation.py", description=__doc__)
    for name, default in (("samples", 50_000), ("references", 50_000), ("size", 2048)):
        parser.add_argument(f"--{name}", type=cli.count, default=default)
    parser.add_argument("--out", default="evaluation.json")
    args = parser.parse_args(argv[1:])
    samples, references = (
        drawn(count, args.size, seed) for seed, count in enumerate((args.samples, args.references))
    )
    ours, moments = timed("mean and covariance of the samples", in_slices, samples)
    theirs = in_slices(references)
    _, distance = timed("Fréchet distance", metrics.frechet, ours, theirs)
    _, manifolds = timed("precision and recall", metrics.precision_recall, references, samples)
    _, kernels = timed("kernel distance", metrics.kernel_distance, references, samples)
    rows = [moments, distance, manifolds, kernels]
    print(f"| {args.samples:,} and {args.references:,} × {args.size} | s | CPU s | peak GB |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        numbers = (row["seconds"], row["cpu_seconds"], row["peak_gb"])
        print(f"| {row['name']} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    pathlib.Path(args.out).write_text(json.dumps(vars(args) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(bench)
