"""What fewer steps, skipped guidance and larger batches cost and save in sampling.

python benchmarks/sampling.py                every sampler at 5 to 250 steps, on a run on digits
python benchmarks/sampling.py --suite=skip   guidance left out where its weight is nearly 1

quality: Fréchet distance in pixels to held-out digits, and the share that a classifier reads as the
class asked for, guided as the checkpoint's config says. Samplers of order two are measured with
each spacing up to about 20 steps; the one of the least distance there goes on to more. Samples of
these 20 steps, and of DDPM with the most, are drawn with each seed, others with the first one.
skip: at the largest of --steps, with the published guidance.

Prints tables and leaves sampling.json and sampling.png, or skip.json, in --out.
Stopped, quality goes on with the same command.
"""

import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from mdt_jax import cli
from mdt_jax.data import sources
from mdt_jax.data.images import to_uint8
from mdt_jax.diffusion.options import SampleOptions, balanced_labels
from mdt_jax.evaluation.evaluator import evaluate_samples
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.generation import generate
from mdt_jax.train.workdir import make, write_json
from mdt_jax.weights.kinds import Weights, params_sha256
from mdt_jax.weights.networks import load_weights

FIRST_ORDER = {
    "DDPM": {"sampler": "ddpm"},
    "DDIM": {"sampler": "ddim"},
    "DDIM, η = 1": {"sampler": "ddim", "eta": 1.0},
}
SECOND_ORDER = {"DPM-Solver++(2M)": "dpmpp_2m", "its SDE form": "dpmpp_2m_sde", "Heun": "heun"}
SPACINGS = ("even", "log_snr", "karras")
USUAL = 20  # steps at which the spacings are compared
MEASURES = ("frechet_distance", "class_agreement")
TOLERANCES = (0.0, 1e-4, 1e-3, 1e-2)
PUBLISHED = {"guidance": "power_cosine", "guidance_power": 4.0, "guidance_scale": 3.8}
ROUNDS = 3  # in which each tolerance is timed
MACHINE = {"cores": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__}


def load_digits(checkpoint: str) -> Weights:
    """The EMA of a run on digits with classes; UserError for anything else."""
    weights = load_weights(checkpoint)
    of_digits = weights.config is not None and weights.config.data.name == "digits"
    if not of_digits or not weights.model.num_classes:
        raise UserError(f"{checkpoint} is not a run on digits and their classes")
    return weights


def markdown(columns: dict[str, str], rows: list[list]) -> str:
    """A table; columns: head → format of the values below it."""
    lines = [
        [f"{value:{form}}" for value, form in zip(row, columns.values(), strict=True)]
        for row in rows
    ]
    lines = [list(columns), ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclasses.dataclass
class Cells:
    """What was measured of a network's samples, kept in a file as it comes."""

    path: pathlib.Path
    weights: Weights
    samples: int

    def __post_init__(self):
        self.what = {"network": params_sha256(self.weights.params), "samples": self.samples}
        self.what["config"] = self.weights.config.to_dict()
        self.kept = []
        if self.path.is_file():
            found = json.loads(self.path.read_text())
            if {name: found.get(name) for name in self.what} == self.what:
                self.kept = found["cells"]

    def measure(self, options: SampleOptions, seed: int) -> dict:
        """Of one way to sample, unless that was done before."""
        names = ("sampler", "spacing", "eta", "num_steps")
        cell = {name: getattr(options, name) for name in names} | {"seed": seed}
        for kept in self.kept:
            if cell.items() <= kept.items():
                return kept
        print(" ".join(f"{name}={value}" for name, value in cell.items()), file=sys.stderr)
        model, params, config = self.weights[:3]
        labels, size = balanced_labels(self.samples, model.num_classes), config.sample.batch_size
        drawn = generate(model, params, labels, seed=seed, batch_size=size, options=options)
        train, held_out = sources.load(config.data.name)
        cell["evaluations"] = len(options.guided_evaluations())
        cell |= evaluate_samples(to_uint8(drawn), labels, train, held_out)
        self.kept.append(cell)
        write_json(self.path, {**MACHINE, **self.what, "cells": self.kept})
        return cell


def quality(flags, out: pathlib.Path) -> str:
    """Every sampler at each number of steps; returns tables."""
    weights = load_digits(flags.checkpoint)
    base, steps = SampleOptions.from_config(weights.config), sorted(set(flags.steps))

    def options(count: int, sampler: str, eta: float = 0.0, spacing: str = "even"):
        how = {"num_steps": count, "sampler": sampler, "eta": eta, "spacing": spacing}
        return dataclasses.replace(base, **how)

    for count in steps:
        options(count, "ddpm").check(weights.model.num_classes)
    make(out)
    cells = Cells(out / "sampling.json", weights, flags.samples or 1000)
    few, most = min(steps, key=lambda count: abs(count - USUAL)), steps[-1]

    def seeds(count: int, **how) -> list[dict]:
        return [cells.measure(options(count, **how), seed) for seed in flags.seeds]

    def row(way: dict, counts: list[int]) -> list[dict]:
        return [cells.measure(options(count, **way), flags.seeds[0]) for count in counts]

    spread = {f"DDPM, {most} steps": seeds(most, **FIRST_ORDER["DDPM"])}
    rows, short = dict(FIRST_ORDER), {}
    for name, sampler in SECOND_ORDER.items():
        ways = {
            f"{name}, {spacing}": {"sampler": sampler, "spacing": spacing} for spacing in SPACINGS
        }
        found = {each: seeds(few, **way) for each, way in ways.items()}
        spread |= {f"{each}, {few} steps": measured for each, measured in found.items()}
        best = min(found, key=lambda each, found=found: np.mean(values(found[each])[0]))
        rows[best] = ways.pop(best)
        short |= ways
    curves = {name: row(way, steps) for name, way in rows.items()}
    upto = [count for count in steps if count <= few]
    draw_curves(out / "sampling.png", curves)
    more = {name: row(way, upto) for name, way in short.items()}
    return f"{steps_table(curves | more)}\n\n{spread_table(spread)}"


def values(cells: list[dict]) -> list[list[float]]:
    """Of each of MEASURES, those of all cells."""
    return [[cell[measure] for cell in cells] for measure in MEASURES]


def steps_table(curves: dict[str, list[dict]]) -> str:
    """Distance and agreement, and the evaluations where they are not the steps; markdown."""

    def text(cell: dict) -> str:
        more = cell["evaluations"] != cell["num_steps"]
        evaluations = f" ({cell['evaluations']})" if more else ""
        return f"{cell[MEASURES[0]]:.2f} · {cell[MEASURES[1]]:.3f}{evaluations}"

    first = next(iter(curves.values()))
    columns = dict.fromkeys(["steps", *(str(cell["num_steps"]) for cell in first)], "")
    blank = [""] * len(first)
    rows = [[name, *map(text, c), *blank[len(c) :]] for name, c in curves.items()]
    real = f"{first[0]['frechet_distance_real']:.2f}"
    return markdown(columns, [*rows, ["*real training images*", real, *blank[1:]]])


def spread_table(spread: dict[str, list[dict]]) -> str:
    """Mean ± deviation over the seeds, and the distance over the first row's; markdown."""
    first, rows = np.mean(values(next(iter(spread.values())))[0]), []
    for name, cells in spread.items():
        (distance, of_it), (agreement, of_agreement) = (
            (np.mean(each), np.std(each, ddof=len(each) > 1)) for each in values(cells)
        )
        texts = [f"{distance:.3f} ± {of_it:.3f}", f"{agreement:.3f} ± {of_agreement:.3f}"]
        rows.append([name, cells[0]["evaluations"], texts[0], distance / first, texts[1]])
    columns = {"": "", "evaluations": "", "Fréchet distance": "", "over the first": ".2f"}
    return markdown(columns | {"class agreement": ""}, rows)


def draw_curves(path: pathlib.Path, curves: dict[str, list[dict]]) -> None:
    """Both measures against the evaluations of the network; what is far off is cut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, measure in zip(axes, MEASURES, strict=True):
        for (name, cells), mark in zip(curves.items(), "osv^D*", strict=True):
            counts = [cell["evaluations"] for cell in cells]
            axis.plot(counts, [cell[measure] for cell in cells], marker=mark, ms=5, label=name)
        axis.set_xscale("log")
        counts = sorted({cell["num_steps"] for cells in curves.values() for cell in cells})
        axis.set_xticks(counts, list(map(str, counts)))
        axis.minorticks_off()
        axis.set_xlabel("evaluations of the network")
        axis.set_ylabel(measure.replace("_", " ").replace("frechet", "Fréchet"))
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    for ticks in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        ticks("{x:g}")
    real = next(iter(curves.values()))[0]["frechet_distance_real"]
    axes[0].axhline(real, color="grey", linestyle=":", label="real images")
    middles = [np.median(each) for each in values(sum(curves.values(), []))]
    axes[0].set_ylim(top=3 * middles[0])
    axes[1].set_ylim(max(0, middles[1] - 0.05), min(1.005, middles[1] + 0.05))
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")


def timed(call: Callable, *arguments, **named) -> tuple[np.ndarray, object]:
    """([seconds of the clock, of this process's CPU time], what the call returned)."""
    started = np.array([time.perf_counter(), time.process_time()])
    result = call(*arguments, **named)
    return np.array([time.perf_counter(), time.process_time()]) - started, result


def skip(flags, out: pathlib.Path) -> str:
    """Each tolerance against 0, where both halves are always evaluated; returns a table."""
    model, params, config = load_digits(flags.checkpoint)[:3]
    labels, steps = balanced_labels(flags.samples or 100, model.num_classes), max(flags.steps)
    base = SampleOptions(num_steps=steps, diffusion_steps=config.diffusion.steps, **PUBLISHED)
    base.check(model.num_classes)
    make(out)
    ways = [dataclasses.replace(base, guidance_skip_tolerance=each) for each in TOLERANCES]
    found = {way: [] for way in ways}
    for _ in range(1 + ROUNDS):  # the first compiles
        for way in ways:
            drawn = timed(generate, model, params, labels, batch_size=len(labels), options=way)
            found[way].append(drawn)
    whole, rows = found[ways[0]][0][1], []
    for way, rounds in found.items():
        doubled, drawn = way.guided_evaluations(), rounds[0][1]
        seconds, cpu = np.median([spent for spent, _ in rounds[1:]], axis=0)
        passes = len(doubled) + int(doubled.sum())
        grey = np.abs(to_uint8(drawn).astype(int) - to_uint8(whole))
        rows.append({
            "tolerance": way.guidance_skip_tolerance,
            "doubled": int(doubled.sum()),
            "token_passes": passes * model.num_tokens,
            "saved": 1 - passes / (2 * len(doubled)),
            "seconds": float(seconds),
            "cpu_seconds": float(cpu),
            "largest_difference": float(np.abs(drawn - whole).max()),
            "largest_grey_levels": int(grey.max()),
            "pixels_that_differ": float(np.mean(grey > 0)),
        })  # fmt: skip
    what = {"samples": len(labels), "num_steps": steps, "network": params_sha256(params)}
    write_json(out / "skip.json", {**MACHINE, **what, "rows": rows})
    columns = {"tolerance": "g", "doubled steps": "", "token-passes an image": ",", "saved": ".1%"}
    columns |= {"seconds": ".2f", "CPU seconds": ".2f", "largest difference": ".2g"}
    columns |= {"in grey levels": "", "pixels that differ": ".2%"}
    return markdown(columns, [list(row.values()) for row in rows])


SUITES = {"quality": quality, "skip": skip}


def numbers(least: int) -> Callable[[str], list[int]]:
    """Reads "1,2,3", each number at least so large."""

    def numbers(text: str) -> list[int]:
        if min(found := [int(part) for part in text.split(",")]) < least:
            raise ValueError
        return found

    return numbers


def several(text: str) -> int:  # a covariance of one sample is none
    return numbers(2)(text)[0]


def bench(argv: list[str]) -> None:
    """Read the flags, run, write and print."""
    parser = cli.Parser(prog="python benchmarks/sampling.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--suite", choices=list(SUITES), default="quality")
    add("--checkpoint", default="runs/digits", help="quality, skip: a run on digits")
    add("--steps", type=numbers(1), default=[5, 10, 20, 50, 100, 250], help="such as 5,10,20")
    add("--samples", type=several, help="default: 1000, or skip 100")
    add("--seeds", type=numbers(0), default=[0, 1, 2], help="quality: such as 0,1,2")
    add("--out", default="runs/sampling", help="folder")
    flags = parser.parse_args(argv[1:])
    print(SUITES[flags.suite](flags, pathlib.Path(flags.out)))


if __name__ == "__main__":
    cli.run(bench)
