"""Which network learns faster? Train several on the same images, and look at them as they go.

python benchmarks/convergence.py --data=mnist       DiT, MDT and MDTv2 of equal size, 3 seeds
python benchmarks/convergence.py --data=mnist --suite=parts      which part of MDT does it
python benchmarks/convergence.py --data=mnist --suite=tuning     the same networks, three rates each
python benchmarks/convergence.py --suite=ablations  MDT against each switch of section 5.3
python benchmarks/convergence.py --suite=finetune   digits 5–9 from scratch, and from 0–4's weights

All are a recipe of configs/ but for the fields in SETS and SUITES, trained for the same number of
steps at a constant rate. At each checkpoint unguided EMA samples are measured: Fréchet distance to
held-out images in features of a small classifier (benchmarks/features.py) and in pixels, and the
share that the classifier reads as the class asked for. So are the losses of held-out and of
training images. Prints tables and leaves convergence.png and convergence.json in --out. Stopped, it
goes on with the same command; with more --steps it trains the same runs further.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys

import curves
import jax
import numpy as np
from features import Classifier, load_images
from ml_collections import ConfigDict

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.data.images import to_uint8
from mdt_jax.data.sources import Images
from mdt_jax.diffusion.options import SampleOptions, balanced_labels
from mdt_jax.evaluation import metrics, references
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.image_sets import ArrayImages
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.generation import generate
from mdt_jax.train import costs, loop
from mdt_jax.train.log import read_steps
from mdt_jax.train.step import Objective, batch_latents, draw_step, sample_losses
from mdt_jax.train.workdir import make, write_json
from mdt_jax.weights.networks import load_weights

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Set:
    """Images to train on.

    recipe: of configs/; changes: to its fields; steps: of training; every: steps between points of
    a curve; rates: the learning rate of each of MODELS, which the suite "tuning" compares.
    """

    recipe: str
    steps: int
    every: int
    changes: dict
    rates: dict[str, float]


# Recipes of MDTv2 are made MDT; MODELS makes it what they were. The rate is constant, so that a run
# may go on.
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
# For short runs on digits: an EMA that does not lag behind by half of them.
DIGITS = {"data.batch_size": 64, "optim.ema_decay": 0.99}
SETS = {
    "digits": Set("digits", 1500, 250, DIGITS, {"DiT": 4e-3, "MDT": 4e-3, "MDTv2": 8e-3}),
    "digits_5_9": Set("finetune_digits", 600, 100, {}, {"MDT": 2e-3}),
    "mnist": Set("mnist", 6000, 500, SMALL, {"DiT": 6e-3, "MDT": 6e-3, "MDTv2": 12e-3}),
    "mnist_2": Set("mnist", 2000, 250, SMALL | {"model.patch_size": 2},
                   {"DiT": 6e-3, "MDT": 6e-3, "MDTv2": 12e-3}),
    "emoji": Set("emoji", 4000, 500, SMALL, {"DiT": 6e-3, "MDT": 6e-3, "MDTv2": 12e-3}),
}  # fmt: skip

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
    "optim.clip_norm": 1.0,
}
MODELS: dict[str, dict] = {"DiT": DIT, "MDT": {}, "MDTv2": MDTV2}
PLAIN = {
    "model.relative_bias": False,
    "model.learned_position": False,
    "model.side_interpolater": False,
}
SUITES: dict[str, dict[str, dict]] = {
    "models": MODELS,
    # From DiT to MDTv2. A step of MDT has two passes, of other noise; so has a doubled batch.
    "parts": {
        "DiT": DIT,
        "DiT, batch doubled": DIT,
        "bias and positions": {"mask.passes": "full"},
        "masked pass": PLAIN,
        "masked pass, bias and positions": {"model.side_interpolater": False},
        "MDT": {},
        "MDT, ratio 0.1": {"mask.ratio": 0.1},
        "MDT, ratio 0.5": {"mask.ratio": 0.5},
        "MDT by min-SNR": {"diffusion.loss_weight": "min_snr_5"},
        "MDTv2 by AdamW": MDTV2 | {"optim.name": "adamw"},
        "MDTv2": MDTV2,
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
TRIALS = (0.5, 1.0, 2.0)  # of the suite "tuning": times the set's rates
# The run whose weights are fine-tuned.
SOURCE = {"data.name": "digits_0_4", "model.num_classes": 5}
CURVES = ("models", "parts", "finetune")  # other suites are measured after the last step alone
LOSS_DRAWS = 2  # timesteps for each image of a loss


def suite_of(name: str, data: str) -> dict[str, dict]:
    """The networks of a suite on a set, by name: changes to the set's recipe."""
    rates = SETS[data].rates
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
        suite["DiT, batch doubled"]["data.batch_size"] = 2 * SETS[data].changes["data.batch_size"]
    return suite


def _nearest(changes: dict) -> str:
    """Which of MODELS a network has its learning rate from."""
    if changes.get("model.decoder_layers") == 0:
        return "DiT"
    return "MDTv2" if changes.get("optim.name") == "adan" else "MDT"


def recipe(
    data: str, changes: dict, seed: int, steps: int, every: int, samples: int, variant: str = "",
    path: str = "",
) -> ConfigDict:  # fmt: skip
    """The config of a run on a set, with `changes` to it."""
    config = configs.load(str(ROOT / "configs" / f"{SETS[data].recipe}.py"))
    config.update_from_flattened_dict(SETS[data].changes | changes)
    config = configs.variant(config, variant)
    config.optim.warmup_steps = min(config.optim.warmup_steps, steps - 1)
    config.train.update(steps=steps, seed=seed, log_every=max(1, every // 4))
    config.train.update(checkpoint_every=every, keep=1000, sample_every=0)
    config.sample.update(guidance_scale=1.0, num_samples=0, batch_size=min(samples, 100))
    config.sample.num_steps = min(config.sample.num_steps, 50)
    config.evaluation.reference = ""
    if path:
        config.data.path = f"{path}/train"
    return config


class Measures:
    """Measures checkpoints against the real images of a set."""

    def __init__(self, data: str, path: str, samples: int):
        self.train, self.held_out = load_images(data, path)
        self.samples, self.classifier = samples, Classifier(data)
        self.known = {"samples": samples, "classifier": self.classifier.sha256}
        self._pixels = None
        if self.held_out.images[0].size < 1000:  # else a covariance takes longer than training
            reference = references.of_split("the held-out images", self.train, self.held_out)
            self._pixels = Evaluator(reference, ("pixels",))
        self._real = metrics.gaussian(self.classifier(self.held_out.images)[0])

    def real(self) -> dict[str, float]:
        """The measures of training images, as if they were samples: what a perfect model has."""
        chosen = np.random.RandomState(0).permutation(len(self.train))[: self.samples]
        return self._of(self.train.images[chosen], self.train.labels[chosen])

    def _of(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        features, classes = self.classifier(images)
        measured = {
            "distance": metrics.frechet(metrics.gaussian(features), self._real),
            "class_agreement": float(np.mean(classes == labels)),
        }
        if self._pixels:
            of_pixels = self._pixels.measure(ArrayImages("the samples", images, labels))
            measured["pixel_distance"] = of_pixels["frechet_distance"]
        return measured

    def of(self, folder: pathlib.Path, config: ConfigDict) -> dict[str, float]:
        """The measures of a checkpoint."""
        model, params, *_ = load_weights(folder)
        labels = balanced_labels(self.samples, model.num_classes)
        options, size = SampleOptions.from_config(config), config.sample.batch_size
        drawn = generate(model, params, labels, batch_size=size, options=options)
        losses = {
            name: held_loss(model, params, images)
            for name, images in (("held_out_loss", self.held_out), ("training_loss", self.train))
        }
        return self._of(to_uint8(drawn), labels) | losses


@functools.cache
def _loss(model: MDT, steps: int):
    objective = Objective(passes="full", steps=steps)

    def loss(params, batch, draws):
        batch = {**batch, "latents": batch_latents(batch, None, 1.0)}
        return sample_losses(model, objective, params, batch, draws)[1]["mse/full"].mean()

    return jax.jit(loss)


def held_loss(
    model: MDT, params: dict, images: Images, steps: int = 1000, size: int = 100
) -> float:
    """The squared error of a full pass over at most 1,000 images, each at LOSS_DRAWS timesteps.

    The timesteps are spread evenly, and they and the noise are the same for every network.
    """
    count = min(len(images), 1000) // size * size or len(images)
    chosen = np.random.RandomState(0).permutation(len(images))[:count]
    size, values = min(size, count), []
    for number in range(LOSS_DRAWS * count // size):
        rows = chosen[np.arange(number * size, (number + 1) * size) % count]
        draws = draw_step(jax.random.key(0), number, model, size, steps)
        t = (np.arange(size) + np.random.RandomState(number).rand(size)) * steps // size
        draws = draws._replace(t=t.astype(np.int32), drop_full=np.zeros(size, bool))
        batch = {"images": images.images[rows], "labels": images.labels[rows].astype(np.int32)}
        values.append(float(_loss(model, steps)(params, batch, draws)))
    return float(np.mean(values))


def run(config: ConfigDict, workdir: pathlib.Path, measures: Measures) -> dict:
    """Train one and measure each of its checkpoints, unless that was done before."""
    path, groups = workdir / "curve.json", config.to_dict()
    steps = groups["train"].pop("steps")
    wanted = {"config": groups, **measures.known}
    points: list[dict] = []
    if path.is_file():
        curve = json.loads(path.read_text())
        if {name: curve[name] for name in wanted} == wanted:
            points = curve["points"]
    if points and points[-1]["step"] >= steps:
        return curve | {"points": [point for point in points if point["step"] <= steps]}
    with contextlib.redirect_stdout(sys.stderr):
        ended = loop.train(config, workdir)
    if not ended:
        raise UserError("stopped; the same command goes on")
    done = {point["step"] for point in points}
    for step in sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir()):
        if step and step not in done:
            print(f"measuring step {step}", file=sys.stderr)
            measured = measures.of(workdir / "checkpoints" / str(step), config)
            points.append({"step": step, **measured})
            curve = {**wanted, **cost(config, workdir), "points": sorted(points, key=by_step)}
            write_json(path, curve)
    return curve


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
    parser.add_argument("--steps", type=whole_number, help="of training; default: of the set")
    parser.add_argument("--samples", type=whole_number, default=500, help="of each checkpoint")
    parser.add_argument("--only", default="", help="networks of the suite, separated by ;")
    parser.add_argument("--variant", default="", choices=["", "smoke"], help="of the recipe")
    parser.add_argument("--path", default="", help="the folder that benchmarks/emoji.py made")
    parser.add_argument("--out", default="", help="folder; default: runs/convergence-DATA-SUITE")
    flags = parser.parse_args(argv[1:])
    data = "digits_5_9" if flags.suite == "finetune" else flags.data
    suite, steps = suite_of(flags.suite, data), flags.steps or SETS[data].steps
    if unknown := {*filter(None, flags.only.split(";"))} - {*suite}:
        raise UserError(f"--only: {min(unknown)!r} is none of {'; '.join(suite)}")
    suite = {name: suite[name] for name in suite if not flags.only or name in flags.only.split(";")}
    every = min(SETS[data].every, max(1, steps // 2)) if flags.suite in CURVES else steps
    measures = Measures(data, flags.path, flags.samples)
    out = pathlib.Path(flags.out or f"runs/convergence-{data}-{flags.suite}")
    make(out)
    common = {}
    if flags.suite == "finetune":
        print("the run to start from: digits 0–4", file=sys.stderr)
        rate = {"optim.lr": SETS["digits"].rates["MDT"]}
        config = recipe(
            "digits", SOURCE | rate, 0, 2 * steps, 2 * steps, flags.samples, flags.variant
        )
        with contextlib.redirect_stdout(sys.stderr):
            loop.train(config, out / "source")
        common = {"init.checkpoint": str(out / "source")}
    runs: dict[str, list[dict]] = {name: [] for name in suite}
    jobs = [(name, seed) for seed in flags.seeds for name in suite]
    for number, (name, seed) in enumerate(jobs, start=1):
        print(f"run {number} of {len(jobs)}: {name}, seed {seed}", file=sys.stderr)
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
