"""Evaluate: python -m mdt_jax.evaluate --samples=samples.npz --reference=VIRTUAL.npz
--inception=pt_inception-2015-12-05-6726825d.pth

FID, sFID, Inception Score, precision and recall as ADM's evaluator defines them, in a table and,
with all settings, in a card: a JSON beside an npz or a folder that mdt_jax.sample wrote, or where
--out says. The same command goes on where it was stopped.
Also: --make_reference=IMAGES --out=reference.npz; --vae=VAE --images=IMAGES: what a VAE loses.
"""

import argparse
import contextlib
import json
import math
import pathlib

from mdt_jax import __version__, cli
from mdt_jax.data.images import UINT8_RULE
from mdt_jax.evaluation import measuring, references
from mdt_jax.evaluation.features import Parts, extract
from mdt_jax.evaluation.image_sets import Files, StoredSet, open_arrays, open_images
from mdt_jax.runtime import hosts, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write
from mdt_jax.runtime.hosts import is_first
from mdt_jax.runtime.progress import print_result
from mdt_jax.sampling import pipeline
from mdt_jax.weights import networks, vae

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "frechet_distance": "Fréchet distance",
    "frechet_distance_real": "that of real training images",
    "frechet_ratio": "the first over the second",
    "class_agreement": "class agreement",
    "classifier_accuracy": "the classifier's accuracy",
    "rfid": "rFID",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
}
# The flag of each task → (the flag that it requires, its other flags). All tasks have --image_size
# and --inception.
TASKS = {
    "samples": ("reference", ("features", "num_samples", "out")),
    "make_reference": ("out", ()),
    "vae": ("images", ("num_samples", "out")),
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, str]:
    """(the values of the flags, the task)."""
    parser = cli.Parser(
        prog="python -m mdt_jax.evaluate",
        usage="python -m mdt_jax.evaluate --samples=NPZ --reference=NPZ --inception=FILE | "
        "--make_reference=IMAGES --out=NPZ --inception=FILE | --vae=VAE --images=IMAGES",
        description="Measure samples against real images, as ADM's evaluator does. IMAGES are an "
        "npz, a folder, a .csv or .jsonl list, a .tar, tfds:NAME:SPLIT, or digits, mnist, …",
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--samples", type=cli.local, help="npz or folder of images to measure")
    add("--make_reference", metavar="IMAGES", type=cli.local, help="write statistics of IMAGES")
    add("--vae", type=cli.on_disk, help="measure what encoding and decoding --images loses")
    add = parser.add_argument
    add("--reference", type=cli.local, help="IMAGES, or an npz with mu, sigma, mu_s and sigma_s")
    add("--images", metavar="IMAGES", type=cli.local, help="real images, with --vae")
    add("--inception", type=cli.on_disk, help="weights of FID's Inception: file, folder, hf://…")
    add("--features", help="inception (default), pixels, classifier, or several: pixels,classifier")
    add("--num_samples", type=cli.count, help="measure the first N images")
    add("--image_size", type=cli.count, help="crop image files to this size, as for training")
    add("--out", type=cli.local, help="JSON card (default: beside the samples), or new reference")
    parser.add_processes()
    args = parser.parse_args(argv[1:])
    task = next(name for name in TASKS if getattr(args, name) is not None)
    required, optional = TASKS[task]
    if not getattr(args, required):
        raise UserError(f"--{required} is missing, which --{task} requires")
    for name in ("reference", "images", "features", "num_samples", "out"):
        if getattr(args, name) is not None and name not in (required, *optional):
            raise UserError(f"--{name} is not for --{task}")
    return args, task


def evaluate(args) -> None:
    """Samples against a reference."""
    features = (args.features or "inception").split(",")
    labelled = "classifier" in features
    if args.out:
        card_path(args.out)
    samples = open_images(args.samples, args.image_size, labelled, args.num_samples, drawn=True)
    out = card_path(args.out or default_card(samples))
    reference = references.load(args.reference, args.image_size, labelled)
    evaluator = measuring.Evaluator(reference, features, args.inception or "")
    evaluator.check(samples)
    settings = {
        "samples": about(samples),
        "reference": about_reference(reference),
        "features": [network.note for network in evaluator.networks.values()],
        "neighbours": measuring.NEIGHBOURS,
    }
    hosts.agree({name: json.dumps(value) for name, value in settings.items()})
    say_found(samples, reference.images)
    parts = {}
    if out is not None and features == ["inception"]:
        folder = out.with_name(f"{out.name}.features")
        parts = {
            name: Parts(folder / name, {"of": settings[name], "by": settings["features"]})
            for name in ("samples", "reference")
        }
    with alone_at(out):
        measured = evaluator.measure(samples, parts, progress=True)
        if is_first():
            write(out, measured, settings)
            for each in parts.values():
                each.remove()
                with contextlib.suppress(OSError):
                    each.folder.parent.rmdir()
            show(f"{samples.path} against {reference.path}:", measured, out)


def say_found(*sets: StoredSet | None) -> None:
    """Say what image files there are, and what is left out."""
    for images in sets:
        if isinstance(images, Files):
            hosts.log0(images.found)


def default_card(samples: StoredSet) -> str | None:
    """Beside an npz, and beside what `mdt_jax.sample` wrote; other folders may be data sets."""
    if not samples.path.endswith(".npz") and samples.note is None:
        return None
    return f"{samples.path.rstrip('/')}.json"


def card_path(text: str | None) -> pathlib.Path | None:
    """Where the JSON goes; UserError where it cannot be written or would be of another kind."""
    if text is None:
        return None
    out = pathlib.Path(text)
    if out.suffix != ".json":
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use .json")
    pipeline.check_writable(out)
    return out


def about(images: StoredSet) -> dict:
    """What tells which images were measured, and how they were made, where that is known."""
    return {
        "path": images.path,
        "sha256": images.sha256,
        "images": len(images),
        "shape": list(images.shape),
        "how": images.note,
    }


def about_reference(reference: references.Reference) -> dict:
    note: dict[str, object] = {"path": reference.path, "sha256": reference.sha256}
    note["images"] = None if reference.images is None else len(reference.images)
    for name, gaussian in reference.gaussians.items():
        note[f"statistics_{name}"] = gaussian.count or "of a number of images that is not said"
    return note


def make_reference(args) -> None:
    """Statistics of real images, and some of the images."""
    out = pathlib.Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use .npz")
    pipeline.check_writable(out)
    images = open_images(args.make_reference, args.image_size)
    if out.exists() and "mu" not in open_arrays(args.out):
        raise UserError(f"--out={out} exists and is no reference; choose another name")
    if len(images) < 2:
        raise UserError(f"{images.path} has one image; statistics need two at least")
    network = measuring.load_inception(args.inception or "")
    say_found(images)
    folder = out.with_name(f"{out.name}.features")
    parts = Parts(folder, {"of": about(images), "by": network.note})
    with hosts.alone(locks.beside(out), str(out)):
        found = extract({"inception": network}, images, parts, progress=True)
        if is_first():
            references.save(out, found["inception"], references.sample_of(images))
            parts.remove()
            print_result(f"wrote the statistics of {len(images)} images to {out}")


def evaluate_vae(args) -> None:
    """Images against what a VAE makes of them."""
    out = card_path(args.out)
    network, params = networks.load_vae(args.vae)
    images = open_images(args.images, args.image_size, num=args.num_samples)
    inception = measuring.load_inception(args.inception) if args.inception else None
    back = measuring.Reconstructed(network, params, images)
    say_found(images)
    settings = {
        "vae": args.vae,
        "vae_sha256": vae.sha256(params),
        "latents": "the mean of the posterior",
        "uint8": UINT8_RULE,
        "images": about(images),
        "features": [inception.note] if inception else [],
    }
    with alone_at(out):
        measured = measuring.measure_vae(back, images, inception, progress=True)
        if is_first():
            write(out, measured, settings)
            show(f"{images.path} through {args.vae}:", measured, out)
            if inception is None:
                print_result("no rFID: --inception=FILE was not given")


def alone_at(out: pathlib.Path | None) -> contextlib.AbstractContextManager:
    """Nobody else measures into this card."""
    if out is None:
        return contextlib.nullcontext()
    return hosts.alone(locks.beside(out), str(out))


def write(out: pathlib.Path | None, measured: dict, settings: dict) -> None:
    """The card, before anything is printed: a terminal may be closed by now."""
    if out is None:
        return
    finite = {n: v if math.isfinite(v) else None for n, v in measured.items()}
    card = {"mdt_jax": __version__, "measured": finite, **settings}
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def show(title: str, measured: dict, out: pathlib.Path | None) -> None:
    """A table on the screen."""
    print_result(title)
    for name, value in measured.items():
        if name in NAMES:
            print_result(f"{NAMES[name]:>30}  {value:.4f}")
    count = measured.get("num_samples", measured.get("num_images"))
    print_result(f"{'images':>30}  {count}")
    if out is None:
        print_result("no card with the settings: --out=FILE.json was not given")
    else:
        print_result(f"wrote these and all settings to {out}")


def main(argv: list[str]) -> None:
    """Parse the flags, and run the task."""
    args, task = parse(argv)
    cli.start(args)
    {"samples": evaluate, "make_reference": make_reference, "vae": evaluate_vae}[task](args)


if __name__ == "__main__":
    cli.run(main)
