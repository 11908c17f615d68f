"""Bias and spread of FID and KID on few samples: python benchmarks/few_samples.py

Features are drawn as an Inception gives them: not below 0, correlated, with a decaying spectrum;
for real images, and for two models, of which the second is farther from the real images. Of each
number of samples many subsets are measured. Prints the means and standard deviations, and the share
of pairs of subsets, one of each model, that rank the models rightly; few_samples.json has the same.
"""

import json
import pathlib

import numpy as np

from mdt_jax import cli
from mdt_jax.evaluation import metrics

NUMBERS = (250, 500, 1000, 2500)
DRAWN = 20_000  # samples of each model, from which subsets are taken
DISTANCES = (0.10, 0.12)  # of the two models from the real images, in arbitrary units


def drawn(count: int, size: int, seed: int) -> np.ndarray:
    """[count, size] float32. The eigenvalues of the covariance before the ReLU fall as k^-1.4."""
    axes, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((size, size)))
    mix = (axes * np.arange(1, size + 1) ** -0.7) @ axes.T * np.sqrt(size) * 0.3
    rows = np.random.default_rng(seed).standard_normal((count, size))
    return np.maximum(rows @ mix + 0.3, 0).astype(np.float32)


def of_model(count: int, real: np.ndarray, distance: float, seed: int) -> np.ndarray:
    """Features with less spread than the real ones, and with another mean."""
    size, mean = real.shape[1], real.mean(0)
    shift = np.random.default_rng(5).standard_normal(size) * real.std(0)
    rows = drawn(count, size, seed)
    return np.maximum(mean + (rows - mean) * (1 - distance) + distance / 2 * shift, 0)


def measured(real: np.ndarray, models: list[np.ndarray], number: int, repeats: int) -> list[dict]:
    """A row for each metric, of `repeats` subsets of each model."""
    statistics, random = metrics.gaussian(real), np.random.default_rng(number)
    found: dict[str, list[list[float]]] = {"FID": [[], []], "KID": [[], []]}
    for _ in range(repeats):
        for place, model in enumerate(models):
            some = model[random.choice(len(model), number, replace=False)]
            found["FID"][place].append(metrics.frechet(metrics.gaussian(some), statistics))
            found["KID"][place].append(metrics.kernel_distance(real, some))
    rows = []
    for name, values in found.items():
        near, far = map(np.array, values)
        rows.append(
            {
                "metric": name,
                "samples": number,
                "means": [near.mean(), far.mean()],
                "deviations": [near.std(ddof=1), far.std(ddof=1)],
                "ranked rightly": float((far[:, None] > near).mean()),
            }
        )
    return rows


def bench(argv: list[str]) -> None:
    parser = cli.Parser(prog="python benchmarks/few_samples.py", description=__doc__)
    defaults = {"size": 256, "references": 3000, "repeats": 40, "many": 10_000}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=cli.count, default=default)
    parser.add_argument("--numbers", type=cli.count, nargs="*", default=NUMBERS)
    parser.add_argument("--out", default="few_samples.json")
    args = parser.parse_args(argv[1:])
    real = drawn(args.references, args.size, 0)
    models = [
        of_model(DRAWN, real, distance, seed) for seed, distance in enumerate(DISTANCES, start=1)
    ]
    rows = [row for number in args.numbers for row in measured(real, models, number, args.repeats)]
    rows += measured(real, models, args.many, 2)
    print("| samples | metric | nearer model | farther model | ranked rightly |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        both = zip(row["means"], row["deviations"], strict=True)
        near, far = (f"{mean:.4g} ± {deviation:.2g}" for mean, deviation in both)
        share = f"{row['ranked rightly']:.3f}"
        print(f"| {row['samples']:,} | {row['metric']} | {near} | {far} | {share} |")
    pathlib.Path(args.out).write_text(json.dumps(vars(args) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(bench)
