"""Measure a released network as its publication did.

python benchmarks/reproduce.py --row=mdtv2-xl2-g

Downloads the weights, ADM's reference and FID's Inception, draws 50,000 samples on all devices of
this machine with the published settings (mdt_jax.sample), and measures FID, sFID, Inception Score,
precision and recall (mdt_jax.evaluate). Prints them beside the published values with a verdict
each, and writes ROW.json, with all settings and hashes, and ROW.md, a row for docs/results.md.
Rerun the same command to resume it. --row=sd-vae measures what the VAE loses of --images.

The tolerance is what sampling noise explains (benchmarks/sampling_noise.py). It does not include
the differences between TF32 and float32, or between FID's Inception in TensorFlow and here.
"""

import argparse
import dataclasses
import pathlib
import platform
import shutil
import time
import zipfile
from collections.abc import Iterator

import jax
import numpy as np
from downloads import download
from sampling_noise import frechet_bias, frechet_error, score_error, share_error, tolerance

from mdt_jax import __version__, cli, evaluate, sample
from mdt_jax.evaluation import references
from mdt_jax.evaluation.card import TITLES
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.npz_files import reading
from mdt_jax.evaluation.references import Reference
from mdt_jax.runtime import backend
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, check_writable, read_json
from mdt_jax.runtime.progress import log, print_result
from mdt_jax.train.workdir import make, write_json

SAMPLES, FAST = 50_000, 5_000  # drawn; the published values are of the first
SPLIT = 5_000  # samples in each split of ADM's Inception Score
SIZE = 256  # of an image's side
VAE = "hf://stabilityai/sd-vae-ft-ema"
REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
INCEPTION = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A published row. flags: how it was sampled. published: as printed, by metric.

    hours: predicted, on one H100 in bfloat16 (docs/results.md).
    """

    name: str
    source: str
    checkpoint: str
    flags: tuple[str, ...]
    published: dict[str, str]
    hours: float


def _metrics(*values: str) -> dict[str, str]:
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    return dict(zip(names, values, strict=True))


MDT = ("--guidance=power_cosine", "--guidance_scale=3.8", "--guidance_power=4")
ROWS = {
    "mdtv2-xl2-g": Row(
        "MDTv2-XL/2-G", "Gao et al. 2023, arXiv 2303.14389v2",
        "hf://shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt", MDT,
        _metrics("1.58", "4.52", "314.73", "0.79", "0.65"), 4.4,
    ),
    "mdt-xl2-g": Row(
        "MDT-XL/2-G", "Gao et al. 2023, arXiv 2303.14389v1",
        "hf://shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt", MDT,
        _metrics("1.79", "4.57", "283.01", "0.81", "0.61"), 4.0,
    ),
    "dit-xl2-g": Row(
        "DiT-XL/2-G (cfg=1.50)", "Peebles & Xie 2022, arXiv 2212.09748",
        "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
        ("--guidance=constant", "--guidance_scale=1.5"),
        _metrics("2.27", "4.60", "278.24", "0.83", "0.57"), 4.0,
    ),
}  # fmt: skip
# As both publications' sampling scripts: ancestral sampling, labels uniform at random, guidance on
# three channels, TF32 ("high" is that on a GPU; on a TPU it is nearly float32).
FLAGS = (
    "--sampler=ddpm", "--num_steps=250", "--spacing=even", "--guidance_channels=3",
    "--clip_denoised=false", "--labels=random", "--precision=high",
)  # fmt: skip

# The hub's model cards of stabilityai/sd-vae-ft-…: 5,000 images of COCO 2017's validation set.
VAE_ROW = "sd-vae"
VAES = {
    "sd-vae-ft-ema": {"rfid": "4.42", "psnr": "23.8 ± 3.9", "ssim": "0.69 ± 0.13"},
    "sd-vae-ft-mse": {"rfid": "4.70", "psnr": "24.5 ± 3.7", "ssim": "0.71 ± 0.13"},
}
OTHER_IMAGES = "not comparable: published for 5,000 images of COCO 2017"


def located(args: argparse.Namespace, flag: str, default: str, folder: pathlib.Path) -> str:
    """The path that a flag gives, or the default, downloaded if it is a URL."""
    path = getattr(args, flag) or default
    return download(path, folder, flag) if path.startswith(("https://", "http://")) else path


def check_reference(path: str, inception: str) -> Reference:
    """The reference, which must suit the samples and the Inception. Raises UserError."""
    reference = references.load(path)
    if not {"pool", "spatial"} <= reference.gaussians.keys() or reference.images is None:
        raise UserError(f"--reference={path} lacks mu, sigma, mu_s, sigma_s or arr_0, the images")
    height, width = reference.images.shape[:2]
    if (height, width) != (SIZE, SIZE):
        raise UserError(
            f"--reference={path} has images of {height}×{width}, but the samples are {SIZE}×{SIZE}"
        )
    with reading(path), zipfile.ZipFile(path) as archive:  # its images are read after sampling
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged: {damaged}; remove it, and rerun")
    Evaluator(reference, ["inception"], inception)
    return reference


def features(folder: pathlib.Path, name: str) -> Iterator[np.ndarray]:
    """The samples' features that mdt_jax.evaluate kept, some rows at a time."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            yield arrays[name]


def standard_errors(
    measured: dict[str, float], folder: pathlib.Path, reference: Reference
) -> dict[str, float]:
    """The standard error of each metric by sampling noise; folder: the samples' features."""
    logits = np.concatenate([*features(folder, "logits")])
    assert reference.images is not None
    counts = {"precision": len(logits), "recall": len(reference.images)}
    errors = {name: share_error(measured[name], count) for name, count in counts.items()}
    errors["inception_score"] = score_error(logits)[1]
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        errors[metric] = frechet_error(
            lambda n=name: features(folder, n), reference.gaussians[name]
        )
    return errors


def verdicts(
    measured: dict[str, float],
    published: dict[str, str],
    errors: dict[str, float],
    count: int,
    biases: dict[str, float],
) -> list[dict]:
    """A dict for each metric: both values, the tolerance, and the verdict.

    Of fewer samples than were published, FID and sFID (by `biases`) are too large and recall is
    another quantity. Precision is a mean over the samples, and the Inception Score one over splits
    of SPLIT.
    """
    same = ["precision"] + ["inception_score"] * (count % SPLIT == 0)
    rows = []
    for metric, text in published.items():
        allowed = tolerance(errors[metric], len(text.partition(".")[2]))
        row = {"metric": metric, "measured": measured[metric], "published": text}
        if count == SAMPLES or metric in same:
            inside = abs(measured[metric] - float(text)) <= allowed
            row |= {"tolerance": allowed, "verdict": "within" if inside else "outside"}
        else:
            bias = f"; about {biases[metric]:.2f} of it is bias" if metric in biases else ""
            row |= {"tolerance": None, "verdict": f"not comparable: of {count:,} samples{bias}"}
        rows.append(row | {"standard_error": errors[metric]})
    return rows


def table(rows: list[dict]) -> str:
    """The verdicts as a Markdown table."""
    lines = ["| | measured | published | tolerance | verdict |", "| --- " * 5 + "|"]
    for row in rows:
        digits = 3 if row["metric"] in ("precision", "recall", "ssim") else 2
        allowed = row["tolerance"]
        cells = (
            TITLES[row["metric"]],
            f"{row['measured']:.{digits}f}",
            row["published"],
            "" if allowed is None else f"± {allowed:.{digits}f}",
            row["verdict"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """A row of the table in docs/results.md: what was measured, where, and the hashes."""
    cells = [report["row"]]
    for row in report["metrics"]:
        digits = 3 if row["metric"] in ("precision", "recall", "ssim") else 2
        text = f"{row['measured']:.{digits}f}"
        if row["tolerance"] is not None:
            text += f" ± {row['tolerance']:.{digits}f}, {row['verdict']}"
        cells.append(text)
    hashes = " · ".join(f"{name} {value[:8]}" for name, value in report["sha256"].items())
    hours = sum(report["seconds"].values()) / 3600
    where = f"{len(report['devices'])} × {report['devices'][0]}"
    return f"| {' | '.join([*cells, f'{hours:.2f} h, {where}', hashes])} |\n"


def finish(out: pathlib.Path, report: dict) -> None:
    """Write ROW.json and ROW.md, and print the table."""
    report |= {
        "mdt_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }
    write_json(out.with_name(f"{out.name}.json"), report)
    with atomic_write(out.with_name(f"{out.name}.md")) as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")
    print_result(
        f"\n{report['row']}, published in {report['source']}:\n\n{table(report['metrics'])}"
    )
    print_result(
        f"\nwrote these, all settings and hashes to {out}.json, and a table row to {out}.md"
    )


def timed(command, *flags: str) -> float:
    """Run a command of the package in this process; returns the seconds it took."""
    began = time.perf_counter()
    command(["", *flags])
    return time.perf_counter() - began


def reproduce(args: argparse.Namespace, workdir: pathlib.Path) -> None:
    """Draw the samples of a row and measure them."""
    row, count = ROWS[args.row], FAST if args.fast else SAMPLES
    out = workdir / (f"{args.row}-fast" if args.fast else args.row)
    samples, card = f"{out}.npz", f"{out}.card.json"
    resumed = any(pathlib.Path(path).exists() for path in (samples, f"{samples}.parts"))
    log("1 of 3: weights and reference, up to 5 GB to download; minutes on a fast network")
    checkpoint = located(args, "checkpoint", row.checkpoint, workdir)
    inception = located(args, "inception", INCEPTION, workdir)
    path = located(args, "reference", REFERENCE, workdir)
    reference = check_reference(path, inception)
    hours = row.hours * count / SAMPLES
    log(
        f"2 of 3: sampling {count:,} images; on one H100 {hours:.1f} h in bfloat16 and about twice "
        "as long in float32 (predicted, not measured on a GPU)"
    )
    seconds = {
        "sampling": timed(
            sample.main, f"--checkpoint={checkpoint}", f"--vae={args.vae or VAE}", *FLAGS,
            *row.flags, f"--num_samples={count}", f"--seed={args.seed}", f"--dtype={args.dtype}",
            f"--batch_size={args.batch_size}", f"--out={samples}", "--distributed=off",
        )
    }  # fmt: skip
    log("3 of 3: measuring; minutes on a GPU, and minutes on the CPU for precision and recall")
    seconds["measuring"] = timed(
        evaluate.main, f"--samples={samples}", f"--reference={path}", f"--inception={inception}",
        f"--out={card}", "--keep_features", "--distributed=off",
    )  # fmt: skip
    settings = read_json(pathlib.Path(card)) or {}
    measured, how = settings["measured"], settings["samples"]["how"]
    folder = pathlib.Path(f"{card}.features")
    errors = standard_errors(measured, folder / "samples", reference)
    biases = {}
    if count < SAMPLES:
        for metric, name in (("fid", "pool"), ("sfid", "spatial")):
            few, many = (frechet_bias(reference.gaussians[name], n) for n in (count, SAMPLES))
            biases[metric] = few - many
    finish(out, {
        "row": row.name, "source": row.source, "samples": count,
        "metrics": verdicts(measured, row.published, errors, count, biases),
        "seconds": seconds, "resumed": resumed,
        "sha256": {
            "weights": how["parameters_sha256"], "VAE": how.get("vae_sha256", ""),
            "reference": settings["reference"]["sha256"],
            "Inception": settings["features"][0]["inception_sha256"],
            "samples": settings["samples"]["sha256"],
        },
        "card": settings,
    })  # fmt: skip
    shutil.rmtree(folder)


def reconstruct(args: argparse.Namespace, workdir: pathlib.Path) -> None:
    """Measure what the VAE loses of images."""
    if not args.images:
        raise UserError(f"--row={VAE_ROW} needs --images=IMAGES, such as imagenet/val")
    if args.fast:
        raise UserError(f"--fast is for rows of samples, not for --row={VAE_ROW}")
    out, vae = workdir / VAE_ROW, args.vae or VAE
    card = f"{out}.card.json"
    log("1 of 2: FID's Inception, 95 MB to download")
    inception = located(args, "inception", INCEPTION, workdir)
    log("2 of 2: encoding, decoding and measuring; the bar shows the time left")
    seconds = timed(
        evaluate.main, f"--vae={vae}", f"--images={args.images}", f"--image_size={SIZE}",
        f"--inception={inception}", f"--out={card}", "--distributed=off",
    )  # fmt: skip
    settings = read_json(pathlib.Path(card)) or {}
    published = next((values for name, values in VAES.items() if name in vae), {})
    finish(out, {
        "row": vae.rpartition("/")[2], "source": "the hub's model card",
        "seconds": {"all": seconds},
        "metrics": [
            {
                "metric": name, "measured": settings["measured"][name], "tolerance": None,
                "published": published.get(name, ""), "verdict": OTHER_IMAGES,
            }
            for name in ("rfid", "psnr", "ssim")
        ],
        "sha256": {
            "VAE": settings["vae_sha256"], "images": settings["images"]["sha256"],
            "Inception": settings["features"][0]["inception_sha256"],
        },
        "card": settings,
    })  # fmt: skip


def bench(argv: list[str]) -> None:
    """Read the flags, download, draw, measure, compare."""
    parser = cli.Parser(
        prog="python benchmarks/reproduce.py",
        description=str(__doc__).partition("\n")[0],
        usage="python benchmarks/reproduce.py --row=ROW [--flag=value …]",
    )
    add = parser.add_argument
    add("--row", required=True, choices=[*ROWS, VAE_ROW])
    add("--workdir", default="runs/reproduce", type=cli.local, help="for downloads and results")
    add("--fast", **cli.SWITCH, help=f"draw {FAST:,} samples, of which FID is not comparable")
    add("--seed", type=int, default=0, help="of the samples")
    add("--batch_size", type=cli.count, default=100, help="changes the speed, not the samples")
    add("--dtype", choices=cli.DTYPES, default="float32", help="float32 (in TF32) is the published")
    for flag, text in (("checkpoint", "weights"), ("vae", f"VAE (default: {VAE})")):
        add(f"--{flag}", type=cli.anywhere_or_hub, help=f"{text}: a file, folder or hf://…")
    add("--reference", type=cli.local, help="ADM's VIRTUAL_imagenet256_labeled.npz")
    add("--inception", type=cli.anywhere_or_hub, help="weights of FID's Inception")
    add("--images", type=cli.anywhere, help=f"real images, of --row={VAE_ROW}")
    args = parser.parse_args(argv[1:])
    if args.images and args.row != VAE_ROW:
        raise UserError(f"--images is for --row={VAE_ROW}")
    workdir = pathlib.Path(args.workdir)
    check_writable(workdir, f"--workdir={workdir}")
    make(workdir)
    backend.keep_freed_memory()
    backend.start()
    (reconstruct if args.row == VAE_ROW else reproduce)(args, workdir)


if __name__ == "__main__":
    cli.run(bench)
