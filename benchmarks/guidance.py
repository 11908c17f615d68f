"""What guidance by a weaker prediction gains, and what it costs not to evaluate the encoder.

python benchmarks/guidance.py --checkpoint=runs/mnist --guide=runs/mnist-small
python benchmarks/guidance.py --checkpoint=runs/mnist --suite=encoder --spacing=log_snr

guidance: the distance and the class agreement of samples for each kind of guidance and each scale.
All kinds cost as much as --steps of classifier-free guidance: one that evaluates less takes more
steps. encoder: the same for samples whose encoder is evaluated in each n-th evaluation only, with
their root mean square difference from the samples of --steps of the sampler, and 250 steps of DDPM.
Distances are Fréchet distances in features of a small classifier (benchmarks/features.py).
Prints a table, and leaves SUITE.json and SUITE.png in --out. Stopped, it goes on with the same
command.
"""

import dataclasses
import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
from measures import Measures

import mdt_jax
from mdt_jax import cli
from mdt_jax.data.images import to_uint8
from mdt_jax.diffusion.options import SampleOptions, balanced_labels
from mdt_jax.models.masking import keep_length
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.train.costs import pass_macs
from mdt_jax.train.workdir import make, write_json

SETS = ("digits", "mnist")
CONSTANT = {"guidance": "constant"}
# Kinds of guidance; "network" takes part where there is a --guide.
GUIDANCE: dict[str, dict] = {
    "without the class": CONSTANT,
    "without the class, power-cosine": {"guidance": "power_cosine", "guidance_power": 2.0},
    "without the class, in an interval": CONSTANT | {"guidance_low": 0.1, "guidance_high": 0.6},
    "masked pass, ratio 0.3": CONSTANT | {"guide": "masked", "guide_ratio": 0.3},
    "masked pass, ratio 0.5": CONSTANT | {"guide": "masked"},
    "masked pass, ratio 0.7": CONSTANT | {"guide": "masked", "guide_ratio": 0.7},
    "a weaker network": CONSTANT | {"guide": "network"},
}
SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
EVERY, DEGREES = (1, 2, 3, 4), (0, 1, 2)
SKIPPING = {"guidance_skip_tolerance": 0.05}


def encoder_macs(model: MDT) -> int:
    """Multiply-accumulates of the encoder for one image: those of its blocks."""
    two_blocks = pass_macs(model) - pass_macs(model.clone(depth=model.depth - 2))
    return two_blocks * (model.depth - model.decoder_layers) // 2


def passes(pipeline: Pipeline, options: SampleOptions) -> float:
    """What samples cost, in full passes of the network."""
    model, guided = pipeline.model, options.guided_evaluations()
    whole = pass_macs(model)
    weaker = whole
    if options.guide == "masked":
        weaker = pass_macs(model, keep_length(model.num_tokens, options.guide_ratio))
    elif options.guide == "network":
        weaker = pass_macs(pipeline.guide.model)
    saved = 0
    if options.encoder_every > 1:
        fresh, _ = options.encoder_schedule(guided)
        weak = pipeline.guide.model if options.guide == "network" else model
        saved = encoder_macs(model) * int((~fresh).sum())
        saved += encoder_macs(weak) * int((~fresh & guided).sum())
    return (len(guided) * whole + int(guided.sum()) * weaker - saved) / whole


def equal_cost(pipeline: Pipeline, options: SampleOptions, budget: float):
    """The options with as many steps as cost no more than `budget` full passes."""
    steps = int(budget)
    while passes(pipeline, dataclasses.replace(options, num_steps=steps)) > budget:
        steps -= 1
    return dataclasses.replace(options, num_steps=steps)


class Bench:
    """Samples of a checkpoint, measured once for each setting."""

    def __init__(self, pipeline: Pipeline, samples: int, path: pathlib.Path):
        self.pipeline, self.path, self.samples = pipeline, path, samples
        self.measures = Measures(pipeline.config.data.name, "", samples)
        guide = pipeline.guide.params_sha256 if pipeline.guide else ""
        known = {"parameters": pipeline.params_sha256, "guide": guide, **self.measures.known}
        saved = json.loads(path.read_text()) if path.is_file() else {}
        if {name: saved.get(name) for name in known} != known:
            saved = {**known, "points": {}}
        self.saved = saved
        self.labels = balanced_labels(samples, pipeline.model.num_classes)

    def draw(self, options: SampleOptions) -> np.ndarray:
        """The samples [N, H, W, C] float32."""
        return self.pipeline.generate(self.labels, options=options, batch_size=100)

    def point(self, kind: str, options: SampleOptions, reference=None) -> dict:
        """The measures of samples; reference: samples that they are compared with."""
        key = json.dumps([kind, dataclasses.asdict(options), reference is not None])
        if key not in self.saved["points"]:
            print(f"{kind}, scale {options.guidance_scale:g}", file=sys.stderr)
            drawn = self.draw(options)
            found = self.measures.of_images(to_uint8(drawn), self.labels)
            found |= {"passes": passes(self.pipeline, options), "steps": options.num_steps}
            found |= {"kind": kind, "scale": options.guidance_scale}
            if reference is not None:
                found["difference"] = float(np.sqrt(np.mean(np.square(drawn - reference))))
            self.saved["points"][key] = found
            write_json(self.path, self.saved)
        return self.saved["points"][key]


def guidance(bench: Bench, options: SampleOptions, scales) -> dict[str, list[dict]]:
    """The points of each kind of guidance."""
    kinds = GUIDANCE if bench.pipeline.guide else {k: GUIDANCE[k] for k in list(GUIDANCE)[:-1]}
    budget = 2.0 * options.num_steps
    points = {}
    for kind, changes in kinds.items():
        # At scale 1 there is no guidance, and all kinds are one.
        points[kind] = [
            bench.point(
                "no guidance" if scale == 1 else kind,
                dataclasses.replace(options, guidance_scale=1.0, num_steps=int(budget))
                if scale == 1
                else equal_cost(
                    bench.pipeline,
                    dataclasses.replace(options, guidance_scale=scale, **changes),
                    budget,
                ),
            )
            for scale in scales
        ]
    return points


def encoder(bench: Bench, options: SampleOptions) -> dict[str, list[dict]]:
    """The points of each way to reuse the encoder, at --steps and twice as many."""
    own = SampleOptions.from_config(bench.pipeline.config)
    ddpm = dataclasses.replace(own, sampler="ddpm", num_steps=250, spacing="even")
    points = {"DDPM, 250 steps": [bench.point("DDPM, 250 steps", ddpm)]}
    for steps in (options.num_steps, 2 * options.num_steps):
        guided = dataclasses.replace(
            own, sampler=options.sampler, spacing=options.spacing, num_steps=steps
        )
        reference = bench.draw(guided)
        for degree in DEGREES:
            for skip in {}, SKIPPING:
                name = f"{steps} steps, degree {degree}" + (", guidance skipped" if skip else "")
                points[name] = []
                for every in EVERY:
                    reuse = {"encoder_every": every, "encoder_order": degree} if every > 1 else {}
                    changed = dataclasses.replace(guided, **reuse, **skip)
                    kind = f"each {every}, degree {degree}" if every > 1 else "always"
                    kind += ", guidance skipped" if skip else ""
                    points[name].append(bench.point(kind, changed, reference) | {"every": every})
    return points


def draw(path: pathlib.Path, points: dict[str, list[dict]], real: dict) -> None:
    """Distance against class agreement; or distance, and difference, against what samples cost."""
    reused = any("difference" in point for of_kind in points.values() for point in of_kind)
    panels = ("distance", "difference") if reused else ("distance",)
    size = (11, 4.5) if reused else (7, 5)
    fewest = min(point["steps"] for of_kind in points.values() for point in of_kind)
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axes, measure in zip(all_axes[0], panels, strict=True):
        for kind, of_kind in points.items():
            found = [point for point in of_kind if measure in point]
            x = [point["passes" if reused else "class_agreement"] for point in found]
            y = [point[measure] for point in found]
            axes.plot(
                x, y, label=kind, ms=5, **(_style(kind, fewest) if reused else {"marker": "o"})
            )
        axes.set(
            xlabel="cost, in full passes of the network" if reused else "class agreement",
            ylabel="Fréchet distance in features"
            if measure == "distance"
            else "root mean square difference\nfrom samples of as many steps",
        )
        if reused:
            axes.set_xscale("log")
            axes.set_xticks([20, 30, 50, 100, 200, 500], ["20", "30", "50", "100", "200", "500"])
            axes.minorticks_off()
        else:
            axes.set_yscale("log")
    first = all_axes[0][0]
    first.axhline(real["distance"], color="0.6", lw=1, ls="--", label="real training images")
    if reused:
        figure.legend(*first.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    else:
        first.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _style(kind: str, fewest: int) -> dict:
    """Colours are degrees, dashes skipped guidance, and squares twice the steps."""
    degree = kind.partition("degree ")[2][:1]
    if not degree:
        return {"marker": "*", "color": "black", "ls": ""}
    small = kind.startswith(f"{fewest} steps")
    return {
        "color": f"C{degree}",
        "ls": "--" if "skipped" in kind else "-",
        "marker": "o" if small else "s",
        "mfc": "white" if "skipped" in kind else f"C{degree}",
    }


def table(points: dict[str, list[dict]]) -> str:
    """The points as a Markdown table."""
    names = ("scale", "steps", "every", "passes", "distance", "class_agreement", "difference")
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("| --- " * (len(names) + 1) + "|")
    for kind, of_kind in points.items():
        for point in of_kind:
            cells = [f"{point[name]:.4g}" if name in point else "" for name in names]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def bench(argv: list[str]) -> None:
    """Read the flags, draw, write and print."""
    parser = cli.Parser(prog="python benchmarks/guidance.py", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run on digits or MNIST")
    parser.add_argument("--guide", default="", help="the run of a weaker network")
    parser.add_argument("--suite", choices=["guidance", "encoder"], default="guidance")
    parser.add_argument("--sampler", default="dpmpp_2m_sde")
    parser.add_argument("--spacing", default="even")
    parser.add_argument("--steps", type=cli.count, default=25)
    parser.add_argument("--scales", type=numbers, default=list(SCALES), help="such as 1,2,4")
    parser.add_argument("--samples", type=cli.count, default=1000)
    parser.add_argument("--out", default="", help="folder; default: runs/guidance-DATA")
    flags = parser.parse_args(argv[1:])
    pipeline = mdt_jax.load(flags.checkpoint, guide=flags.guide or None)
    name = pipeline.config.data.name if pipeline.config is not None else None
    if name not in SETS or not pipeline.model.num_classes:
        raise UserError(f"{flags.checkpoint} is not a run on {' or '.join(SETS)} and its classes")
    out = pathlib.Path(flags.out or f"runs/guidance-{name}")
    make(out)
    options = dataclasses.replace(
        pipeline.options,
        sampler=flags.sampler,
        spacing=flags.spacing,
        num_steps=flags.steps,
        guide="null",
    )
    measured = Bench(pipeline, flags.samples, out / f"{flags.suite}.json")
    if flags.suite == "guidance":
        points = guidance(measured, options, flags.scales)
    else:
        points = encoder(measured, options)
    draw(out / f"{flags.suite}.png", points, measured.measures.real())
    print(table(points))


if __name__ == "__main__":
    cli.run(bench)
