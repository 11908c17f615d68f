"""Which network learns faster? Train several on the same images, and look at them as they go.

python benchmarks/convergence.py                    DiT, MDT and MDTv2 of equal size, 3 seeds
python benchmarks/convergence.py --suite=ablations  MDT against each switch of section 5.3
python benchmarks/convergence.py --suite=finetune   digits 5–9 from scratch, and from 0–4's weights

All are configs/digits.py (finetune: configs/finetune_digits.py) but for the fields in SUITES,
trained for the same number of steps. At six checkpoints (ablations: at the end) unguided EMA
samples are measured: Fréchet distance in pixels to held-out digits, and the share that a classifier
reads as the class asked for. Prints a table and leaves convergence.png and convergence.json in
--out. Stopped, it goes on with the same command.
"""

import contextlib
import json
import pathlib
import sys

import numpy as np
from ml_collections import ConfigDict

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.data import sources
from mdt_jax.data.images import to_uint8
from mdt_jax.diffusion.options import SampleOptions, balanced_labels
from mdt_jax.evaluation.evaluator import evaluate_samples
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.generation import generate
from mdt_jax.train import loop
from mdt_jax.train.log import read_steps
from mdt_jax.train.workdir import make, write_json
from mdt_jax.weights.networks import load_weights

ROOT = pathlib.Path(__file__).parents[1]

DIT = {
    "model.decoder_layers": 0,
    "model.relative_bias": False,
    "model.learned_position": False,
    "mask.passes": "full",
}
MDTV2 = {
    "model.version": "v2",
    "mask.ratio_max": 0.5,
    "diffusion.loss_weight": "min_snr_5",
    "optim.name": "adan",
    "optim.lr": 8e-3,  # twice AdamW's, as one of Adan's authors advises
    "optim.clip_norm": 1.0,
}
SUITES: dict[str, dict[str, dict]] = {
    "models": {"DiT": DIT, "MDT": {}, "MDTv2": MDTV2},
    "ablations": {
        "MDT": {},
        "mask ratio 0.1": {"mask.ratio": 0.1},
        "mask ratio 0.5": {"mask.ratio": 0.5},
        "symmetric masking": {"mask.asymmetric": False},
        "full pass only": {"mask.passes": "full"},
        "masked pass only": {"mask.passes": "masked"},
        "loss on masked tokens": {"mask.loss_on": "masked"},
        "no side-interpolater": {"model.side_interpolater": False},
        "no masked shortcut": {"model.masked_shortcut": False},
        "side-interpolater before the last 1": {"model.decoder_layers": 1},
        "side-interpolater before the last 4": {"model.decoder_layers": 4},
        "2 side blocks": {"model.side_layers": 2},
        "fixed position": {"model.learned_position": False},
        "no relative bias": {"model.relative_bias": False},
    },
    "finetune": {"from scratch": {"init.checkpoint": ""}, "from digits 0–4": {}},
}
BASE = {"models": "digits", "ablations": "digits", "finetune": "finetune_digits"}
# The run whose weights are fine-tuned.
SOURCE = {"data.name": "digits_0_4", "model.num_classes": 5}
# The ablations end while differences still show.
STEPS = {"models": 1200, "ablations": 500, "finetune": 600}
MEASURES = ("frechet_distance", "class_agreement")


def recipe(
    changes: dict, seed: int, steps: int, samples: int, variant: str, curves: bool, name="digits"
) -> ConfigDict:
    """configs/NAME.py for a short run, with `changes` to it; `curves`: six checkpoints."""
    config = configs.load(str(ROOT / "configs" / f"{name}.py"), variant)
    every = max(1, steps // 6) if curves else steps
    if name == "digits":
        # For a short run: a higher rate, and an EMA that does not lag behind by half of it.
        config.optim.update(lr=4e-3, ema_decay=0.99)
    config.train.update(steps=steps, seed=seed, log_every=1, checkpoint_every=every, keep=100)
    config.train.sample_every = 0
    config.sample.update(guidance_scale=1.0, num_samples=0, batch_size=min(samples, 100))
    config.sample.num_steps = min(config.sample.num_steps, 50)
    config.update_from_flattened_dict(changes)
    return config


def run(config: ConfigDict, workdir: pathlib.Path, samples: int) -> dict:
    """Train one and measure each of its checkpoints, unless that was done before."""
    path = workdir / "curve.json"
    wanted = {"config": config.to_dict(), "samples": samples}
    if path.is_file():
        curve = json.loads(path.read_text())
        if {name: curve[name] for name in wanted} == wanted:
            return curve
    with contextlib.redirect_stdout(sys.stderr):
        ended = loop.train(config, workdir)
    if not ended:
        raise UserError("stopped; the same command goes on")
    train, held_out = sources.load(config.data.name)
    lines = read_steps(workdir / "metrics.jsonl")
    seconds = {step: json.loads(line)["seconds"] for step, line in lines}
    points = []
    for step in sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir()):
        model, params, *_ = load_weights(workdir / "checkpoints" / str(step))
        labels = balanced_labels(samples, model.num_classes)
        options = SampleOptions.from_config(config)
        size = config.sample.batch_size
        drawn = generate(model, params, labels, batch_size=size, options=options)
        measured = evaluate_samples(to_uint8(drawn), labels, train, held_out)
        points.append({"step": step, "seconds": seconds[step], **measured})
    curve = {**wanted, "points": points}
    write_json(path, curve)
    return curve


def summarise(curves: dict[str, list[dict]]) -> list[dict]:
    """A row for each network: mean and standard deviation over the seeds after the last step.

    `difference`: of the Fréchet distance to the first network's with the same seed.
    """
    rows, first = [], None
    for name, of_name in curves.items():
        last = [curve["points"][-1] for curve in of_name]
        row = {"name": name, "seeds": len(last), "steps": last[0]["step"]}
        first = first or last
        values = {m: [point[m] for point in last] for m in (*MEASURES, "seconds")}
        values["difference"] = [
            a[MEASURES[0]] - b[MEASURES[0]] for a, b in zip(last, first, strict=True)
        ]
        for measure, of_seeds in values.items():
            row[measure] = float(np.mean(of_seeds))
            row[f"{measure}_deviation"] = float(np.std(of_seeds, ddof=len(of_seeds) > 1))
        rows.append(row)
    return rows


def table(rows: list[dict], real: float) -> str:
    """Markdown."""
    lines = [
        f"| | Fréchet distance | less {rows[0]['name']}'s | class agreement | training seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        distance, gap, agreement, seconds = (
            f"{row[name]:{form}} ± {row[f'{name}_deviation']:{form.lstrip('+')}}"
            for name, form in (
                (MEASURES[0], ".2f"),
                ("difference", "+.2f"),
                (MEASURES[1], ".3f"),
                ("seconds", ".0f"),
            )
        )
        gap = "" if row is rows[0] else gap
        lines.append(f"| {row['name']} | {distance} | {gap} | {agreement} | {seconds} |")
    lines.append(f"| *real training images* | {real:.2f} | | | |")
    return "\n".join(lines)


def draw_curves(path: pathlib.Path, curves: dict[str, list[dict]], real: float) -> None:
    """Both measures against steps and against seconds: mean over the seeds, and their range."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, (measure, label) in enumerate(
        zip(MEASURES, ("Fréchet distance (log scale)", "class agreement"), strict=True)
    ):
        for axis, unit in zip(axes[row], ("step", "seconds"), strict=True):
            for name, of_name in curves.items():
                x, y = (
                    np.array([[point[key] for point in curve["points"]] for curve in of_name])
                    for key in (unit, measure)
                )
                (line,) = axis.plot(x.mean(0), y.mean(0), marker="o", label=name)
                axis.fill_between(
                    x.mean(0), y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0
                )
            axis.grid(alpha=0.3)
        axes[row][0].set_ylabel(label)
    for axis in axes[0]:
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.axhline(real, color="grey", linestyle=":", label="real images")
    axes[1][0].set_xlabel("training steps")
    axes[1][1].set_xlabel("seconds of training")
    axes[0][0].legend()
    figure.savefig(path, dpi=110, format="png")


def draw_dots(path: pathlib.Path, curves: dict[str, list[dict]]) -> None:
    """The Fréchet distance after the last step: a dot for each seed, a bar for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(curves) + 1), layout="constrained")
    axis = figure.subplots()
    for place, of_name in enumerate(curves.values()):
        values = [curve["points"][-1][MEASURES[0]] for curve in of_name]
        axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
        axis.plot(np.mean(values), place, "|", color="C3", markersize=14, markeredgewidth=2)
        if place == 0:
            axis.axvline(np.mean(values), color="grey", linestyle=":")
    axis.set_yticks(range(len(curves)), list(curves))
    axis.invert_yaxis()
    axis.set_xlabel("Fréchet distance (dots: seeds, red: mean, dotted: the first row's mean)")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, format="png")


def whole_number(text: str) -> int:
    if int(text) < 2:
        raise ValueError
    return int(text)


def seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def bench(argv: list[str]) -> None:
    """Read the flags, run, write and print."""
    parser = cli.Parser(prog="python benchmarks/convergence.py", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", choices=list(SUITES), default="models")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("--steps", type=whole_number, help=f"of training; default: {STEPS}")
    parser.add_argument("--samples", type=whole_number, default=500, help="of each checkpoint")
    parser.add_argument("--variant", default="", choices=["", "smoke"], help="of the recipe")
    parser.add_argument("--out", default="", help="folder; default: runs/convergence-SUITE")
    flags = parser.parse_args(argv[1:])
    suite, steps = SUITES[flags.suite], flags.steps or STEPS[flags.suite]
    curved = flags.suite != "ablations"  # which are too many: their ends are compared
    out = pathlib.Path(flags.out or f"runs/convergence-{flags.suite}")
    make(out)
    common = {}
    if flags.suite == "finetune":
        print("the run to start from: digits 0–4", file=sys.stderr)
        config = recipe(SOURCE, 0, 2 * steps, flags.samples, flags.variant, False)
        run(config, out / "source", flags.samples)
        common = {"init.checkpoint": str(out / "source")}
    curves = {name: [] for name in suite}
    jobs = [(name, seed) for seed in flags.seeds for name in suite]
    for number, (name, seed) in enumerate(jobs, start=1):
        print(f"run {number} of {len(jobs)}: {name}, seed {seed}", file=sys.stderr)
        changes = common | suite[name]
        config = recipe(
            changes, seed, steps, flags.samples, flags.variant, curved, BASE[flags.suite]
        )
        workdir = out / name.replace(" ", "-") / str(seed)
        curves[name].append(run(config, workdir, flags.samples))

    rows = summarise(curves)
    real = curves[name][0]["points"][-1]["frechet_distance_real"]
    if curved:
        draw_curves(out / "convergence.png", curves, real)
    else:
        draw_dots(out / "convergence.png", curves)
    report = {"summary": rows, "frechet_distance_real": real, "runs": curves}
    write_json(out / "convergence.json", report)
    print(table(rows, real))


if __name__ == "__main__":
    cli.run(bench)
