"""Which network learns faster? Train several on the same images, and look at them as they go.

python benchmarks/convergence.py --data=mnist       DiT, MDT and MDTv2 of equal size, 3 seeds
python benchmarks/convergence.py --data=mnist --suite=parts      which part of MDT does it
python benchmarks/convergence.py --data=mnist --suite=tuning     the same networks, four rates each
python benchmarks/convergence.py --suite=objectives the same networks predict noise, v or velocity
python benchmarks/convergence.py --suite=ablations  MDT against each switch of section 5.3
python benchmarks/convergence.py --suite=finetune   digits 5–9 from scratch, and from 0–4's weights

All are a recipe of configs/ but for the fields in SETS and SUITES, trained at a constant rate. At
each checkpoint unguided EMA samples are measured: Fréchet distance to held-out images in features
of a small classifier (benchmarks/features.py) and in pixels, and the share that the classifier
reads as the class asked for. So are the losses of held-out and of training images. Prints tables
and leaves convergence.png and convergence.json in --out. Stopped, it goes on with the same command;
with more --steps it trains the same runs further (not those of finetune, whose source is another
one then).
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import curves
import numpy as np
from measures import Measures
from ml_collections import ConfigDict

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import costs, loop
from mdt_jax.train.log import read_steps
from mdt_jax.train.workdir import make, write_json

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Set:
    """Images to train on.

    images: their name in features.py; recipe: of configs/; changes: to its fields; steps: of
    training; every: steps between checkpoints; rates: the learning rate of each of MODELS, which
    the suite "tuning" compares; fewer: the steps of those of MODELS that are trained for fewer
    than DiT.
    """

    images: str
    recipe: str
    steps: int
    every: int
    changes: dict
    rates: dict[str, float]
    fewer: dict[str, int] = dataclasses.field(default_factory=dict)

    def steps_of(self, network: str, suite: str) -> int:
        """For how many steps a network is trained. In a suite other than MODELS all are equal."""
        if suite == "models":
            return self.fewer.get(network, self.steps)
        return min([self.steps, *self.fewer.values()])


# The recipes of MNIST and emoji are of MDTv2; this makes them MDT's. The rate is constant, so that
# a run may go on.
SMALL = {
    "model.version": "v1",
    "mask.ratio_max": 0.0,
    "diffusion.loss_weight": "uniform",
    "optim.name": "adamw",
    "optim.clip_norm": 0.0,
    "model.hidden_size": 64,
    "model.depth": 6,
    "model.num_heads": 4,
    "data.batch_size": 32,
    "optim.schedule": "constant",
    "optim.end_lr": 0.0,
    "optim.warmup_steps": 100,
    "optim.weight_decay": 0.0,
    "optim.ema_decay": 0.995,
    "sample.sampler": "dpmpp_2m_sde",
    "sample.num_steps": 20,
}
# Patches of 7×7 and 2×2 are 16 and 196 tokens; the recipe's of 4×4 are 49.
PATCH_7, PATCH_2 = SMALL | {"model.patch_size": 7}, SMALL | {"model.patch_size": 2}
# For short runs on digits: an EMA that does not lag behind by half of them.
DIGITS = {"data.batch_size": 64, "optim.ema_decay": 0.99}
# On MNIST, twice the rates do better at first, but then the loss of DiT and of MDTv2 jumps.
RATES = {"DiT": 3e-3, "MDT": 3e-3, "MDTv2": 12e-3}
SETS = {
    "digits": Set("digits", "digits", 1500, 25, DIGITS, {"DiT": 4e-3, "MDT": 4e-3, "MDTv2": 8e-3}),
    "mnist": Set("mnist", "mnist", 24_000, 250, SMALL, RATES, {"MDT": 5000, "MDTv2": 6000}),
    "mnist_7": Set("mnist", "mnist", 6000, 250, PATCH_7, RATES, {"MDT": 3000, "MDTv2": 3000}),
    "mnist_2": Set("mnist", "mnist", 2000, 125, PATCH_2, RATES, {"MDT": 1000, "MDTv2": 750}),
    "emoji": Set("emoji", "emoji", 4000, 125, SMALL, RATES, {"MDT": 2000, "MDTv2": 2000}),
}
FINETUNE = Set("digits_5_9", "finetune_digits", 600, 100, {}, {"MDT": 2e-3})

DIT = {
    "model.decoder_layers": 0,
    "model.relative_bias": False,
    "model.learned_position": False,
    "mask.passes": "full",
}
V2_TRAINING = {
    "diffusion.loss_weight": "min_snr_5",
    "optim.name": "adan",
    "optim.clip_norm": 1.0,
}
MDTV2 = {"model.version": "v2", "mask.ratio_max": 0.5} | V2_TRAINING
MODELS: dict[str, dict] = {"DiT": DIT, "MDT": {}, "MDTv2": MDTV2}
# What they may predict. Flow is sampled with as many evaluations as the others.
OBJECTIVES: dict[str, dict] = {
    "epsilon": {},
    "v": {"diffusion.objective": "v"},
    "flow": {
        "diffusion.objective": "flow",
        "sample.sampler": "heun",
        "sample.num_steps": 25,
    },
}
PLAIN = {
    "model.relative_bias": False,
    "model.learned_position": False,
    "model.side_interpolater": False,
}
SUITES: dict[str, dict[str, dict]] = {
    "models": MODELS,
    # From DiT to MDTv2. A step of MDT sees each image twice, with different noise; a doubled batch
    # has as many passes, of twice as many images.
    "parts": {
        "DiT": DIT,
        "DiT, batch doubled": DIT,
        "DiT by Adan and min-SNR": DIT | V2_TRAINING,
        "bias and positions": {"mask.passes": "full"},
        "masked pass": PLAIN,
        "masked pass, bias and positions": {"model.side_interpolater": False},
        "MDT": {},
        "MDT, ratio 0.1": {"mask.ratio": 0.1},
        "MDT, ratio 0.5": {"mask.ratio": 0.5},
        "MDT by min-SNR": {"diffusion.loss_weight": "min_snr_5"},
        "MDTv2 by AdamW": MDTV2 | {"optim.name": "adamw"},
        "MDTv2, full pass only": MDTV2 | {"mask.passes": "full", "mask.ratio_max": 0.0},
        "MDTv2": MDTV2,
    },
    "objectives": {
        f"{network}, {name}": changes | objective
        for network, changes in MODELS.items()
        for name, objective in OBJECTIVES.items()
    },
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
}  # fmt: skip
TRIALS = (0.5, 1.0, 2.0, 4.0)  # of the suite "tuning": times the set's rates
# The run whose weights are fine-tuned.
SOURCE = {"data.name": "digits_0_4", "model.num_classes": 5}
CURVES = ("models", "parts", "finetune")  # other suites are measured after the last step alone


def suite_of(name: str, data: Set) -> dict[str, dict]:
    """The networks of a suite on a set, by name: changes to the set's recipe."""
    rates = data.rates
    if name == "tuning":
        trials = [(network, trial * rates[network]) for network in MODELS for trial in TRIALS]
        return {
            f"{network}, {rate:g}": MODELS[network] | {"optim.lr": rate} for network, rate in trials
        }
    suite = {
        network: {"optim.lr": rates[_nearest(changes)]} | changes
        for network, changes in SUITES[name].items()
    }
    if name == "parts":
        suite["DiT, batch doubled"]["data.batch_size"] = 2 * data.changes["data.batch_size"]
    return suite


def _nearest(changes: dict) -> str:
    """Which of MODELS a network has its learning rate from."""
    if changes.get("optim.name") == "adan":
        return "MDTv2"
    return "DiT" if changes.get("model.decoder_layers") == 0 else "MDT"


def recipe(
    data: Set, changes: dict, seed: int, steps: int, every: int, samples: int, variant: str = "",
    path: str = "",
) -> ConfigDict:  # fmt: skip
    """The config of a run on a set, with `changes` to it. every: steps between checkpoints."""
    config = configs.load(str(ROOT / "configs" / f"{data.recipe}.py"))
    config.update_from_flattened_dict(data.changes | changes)
    config = configs.variant(config, variant)
    config.train.update(steps=steps, seed=seed, log_every=max(1, every // 4))
    config.train.update(checkpoint_every=every, keep=100_000, sample_every=0)
    config.sample.update(guidance_scale=1.0, num_samples=0, batch_size=min(samples, 100))
    config.sample.num_steps = min(config.sample.num_steps, 50)
    config.evaluation.reference = ""
    if path:
        config.data.path = f"{path}/train"
    return config


def is_measured(step: int, config: ConfigDict) -> bool:
    """Whether a checkpoint is a point of the curve: four in each doubling of the steps."""
    number, rest = divmod(step, config.train.checkpoint_every)
    lowest_bit = number & -number
    return step == config.train.steps or (rest == 0 and 0 < number < 8 * lowest_bit)


def run(config: ConfigDict, workdir: pathlib.Path, measures: Measures) -> dict:
    """Train one and measure its checkpoints, unless that was done before.

    Raises UserError where the workdir has another run, and where the run is stopped.
    """
    path, groups = workdir / "curve.json", config.to_dict()
    for name in ("steps", "checkpoint_every", "log_every"):  # a run may go on with others
        del groups["train"][name]
    curve = json.loads(path.read_text()) if path.is_file() else {"config": groups, "points": []}
    if curve["config"] != groups:
        raise UserError(f"{path} is of a run with another config; remove its folder")
    if {name: curve.get(name) for name in measures.known} != measures.known:
        curve = {"config": groups, **measures.known, "points": []}
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, curve)
    done = {point["step"]: point for point in curve["points"]}
    if config.train.steps not in done:
        with contextlib.redirect_stdout(sys.stderr):
            ended = loop.train(config, workdir)
        if not ended:
            raise UserError("stopped; the same command goes on")
        curve |= cost(config, workdir)
    for step in sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir()):
        if step not in done and is_measured(step, config):
            print(f"measuring step {step}", file=sys.stderr)
            measured = measures.of(workdir / "checkpoints" / str(step), config)
            done[step] = {"step": step, **measured}
            curve["points"] = sorted(done.values(), key=by_step)
            write_json(path, curve)
    points = [point for point in curve["points"] if point["step"] <= config.train.steps]
    return curve | {"points": [point for point in points if is_measured(point["step"], config)]}


def by_step(point: dict) -> int:
    return point["step"]


def cost(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """What a step costs: images, operations, and seconds (the median over the log's lines)."""
    lines = [json.loads(line) for _, line in read_steps(workdir / "metrics.jsonl")]
    size = config.data.batch_size
    seconds = float(np.median([size / line["images_per_second"] for line in lines]))
    operations = size * costs.training_flops(config, MDT.from_config(config))
    return {"images": size, "operations": operations, "seconds": seconds}


def whole_number(text: str) -> int:
    if int(text) < 2:
        raise ValueError
    return int(text)


def seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def bench(argv: list[str]) -> None:
    """Read the flags, run, write and print."""
    parser = cli.Parser(prog="python benchmarks/convergence.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=list(SETS), default="digits")
    parser.add_argument("--suite", choices=[*SUITES, "tuning"], default="models")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("--steps", type=whole_number, help="of each network; default: of the set")
    parser.add_argument("--samples", type=whole_number, default=500, help="of each checkpoint")
    parser.add_argument("--only", default="", help="networks of the suite, separated by ;")
    parser.add_argument("--variant", default="", choices=["", "smoke"], help="of the recipe")
    parser.add_argument("--path", default="", help="the folder that benchmarks/emoji.py made")
    parser.add_argument("--out", default="", help="folder; default: runs/convergence-DATA-SUITE")
    flags = parser.parse_args(argv[1:])
    finetune = flags.suite == "finetune"
    if finetune and flags.data != "digits":
        raise UserError(f"--suite=finetune is of digits, not of {flags.data}")
    if flags.variant and flags.data == "emoji":
        raise UserError("--variant=smoke replaces the images of emoji by digits; leave one of them")
    data = FINETUNE if finetune else SETS[flags.data]
    suite = suite_of(flags.suite, data)
    if unknown := {*filter(None, flags.only.split(";"))} - {*suite}:
        raise UserError(f"--only: {min(unknown)!r} is none of {'; '.join(suite)}")
    suite = {name: suite[name] for name in suite if not flags.only or name in flags.only.split(";")}
    lengths = {name: flags.steps or data.steps_of(name, flags.suite) for name in suite}
    measures = Measures(data.images, flags.path, flags.samples)
    out = pathlib.Path(flags.out or f"runs/convergence-{flags.data}-{flags.suite}")
    make(out)
    common = {}
    if finetune:
        print("the run to start from: digits 0–4", file=sys.stderr)
        length = 2 * max(lengths.values())
        source = out / f"source-{length}"
        changes = SOURCE | {"optim.lr": SETS["digits"].rates["MDT"]}
        config = recipe(SETS["digits"], changes, 0, length, length, flags.samples, flags.variant)
        with contextlib.redirect_stdout(sys.stderr):
            ended = loop.train(config, source)
        if not ended:
            raise UserError("stopped; the same command goes on")
        common = {"init.checkpoint": str(source)}
    runs: dict[str, list[dict]] = {name: [] for name in suite}
    jobs = [(name, seed) for seed in flags.seeds for name in suite]
    for number, (name, seed) in enumerate(jobs, start=1):
        print(f"run {number} of {len(jobs)}: {name}, seed {seed}", file=sys.stderr)
        steps = lengths[name]
        every = min(data.every, max(1, steps // 2)) if flags.suite in CURVES else steps
        options = (steps, every, flags.samples, flags.variant, flags.path)
        config = recipe(data, common | suite[name], seed, *options)
        workdir = out / name.replace(",", "").replace(" ", "-") / str(seed)
        runs[name].append(run(config, workdir, measures))

    report = curves.report(runs, measures.real())
    curves.draw(out / "convergence.png", runs, report["real"])
    write_json(out / "convergence.json", {**report, "runs": runs})
    print(curves.tables(report))


if __name__ == "__main__":
    cli.run(bench)
