"""Evaluate: python -m mdt_jax.evaluate --samples=samples.npz --reference=VIRTUAL.npz
--inception=pt_inception-2015-12-05-6726825d.pth

Prints FID, sFID, Inception Score, precision and recall as ADM's evaluator defines them, and KID.
Writes them with all settings to a card: a JSON at --out, or beside an npz or a folder that
mdt_jax.sample wrote. Rerun the same command to resume an interrupted measurement.
For FD-DINOv2: --features=dinov2 --dinov2=dinov2_vitl14_pretrain.pth
Also: --make_reference=IMAGES --out=reference.npz; --vae=VAE --images=IMAGES: what a VAE loses.
"""

import argparse
import contextlib

from mdt_jax import cli
from mdt_jax.data.images import UINT8_RULE
from mdt_jax.evaluation import references
from mdt_jax.evaluation.card import describe_images, describe_reference, report
from mdt_jax.evaluation.evaluator import NEIGHBOURS, SLOW, Evaluator
from mdt_jax.evaluation.feature_networks import load_dinov2, load_inception
from mdt_jax.evaluation.features import FeatureCache, extract
from mdt_jax.evaluation.image_sets import StoredImages, open_images
from mdt_jax.evaluation.npz_files import read_headers
from mdt_jax.evaluation.reconstruction import check_reconstructible, measure_vae
from mdt_jax.evaluation.references import STATISTICS
from mdt_jax.runtime import files, hosts, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import is_first, log0
from mdt_jax.runtime.progress import print_result
from mdt_jax.sampling.writing import check_writable
from mdt_jax.weights.vae import Vae

# The flag of each task → (the flag that it requires, its other flags). All tasks have --image_size
# and --inception.
TASKS = {
    "samples": ("reference", ("features", "dinov2", "num_samples", "out", "keep_features")),
    "make_reference": ("out", ("features", "dinov2")),
    "vae": ("images", ("num_samples", "out")),
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, str]:
    """(the values of the flags, the task)."""
    parser = cli.Parser(
        prog="python -m mdt_jax.evaluate",
        usage="python -m mdt_jax.evaluate --samples=NPZ --reference=NPZ --inception=FILE | "
        "--make_reference=IMAGES --out=NPZ --inception=FILE | --vae=VAE --images=IMAGES",
        description="Measure samples against real images, as ADM's evaluator does. IMAGES are an "
        "npz, a folder, a .csv or .jsonl list, a .tar, a .parquet or a glob of them, "
        "tfds:NAME:SPLIT, or digits, mnist, …",
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--samples", type=cli.anywhere, help="npz or folder of images to measure")
    add("--make_reference", metavar="IMAGES", type=cli.anywhere, help="write statistics of IMAGES")
    add("--vae", type=cli.anywhere_or_hub, help="measure what encoding and decoding --images loses")
    add = parser.add_argument
    add("--reference", type=cli.anywhere, help="IMAGES, or an npz of --make_reference or of ADM's")
    add("--images", metavar="IMAGES", type=cli.anywhere, help="real images, with --vae")
    add(
        "--inception",
        type=cli.anywhere_or_hub,
        help="weights of FID's Inception: file, folder, hf://…",
    )
    add(
        "--dinov2",
        type=cli.anywhere_or_hub,
        help="weights of DINOv2 ViT-L/14: file, folder, hf://…",
    )
    add(
        "--features",
        help="inception (default), dinov2, pixels, classifier, or several: pixels,classifier",
    )
    add("--num_samples", type=cli.count, help="measure the first N images")
    add(
        "--keep_features",
        **dict(cli.SWITCH, default=None),
        help="keep the networks' features, of slices of the images, in OUT.features",
    )
    add(
        "--image_size",
        type=cli.sides,
        metavar="H|HxW",
        help="crop image files to this size, as for training",
    )
    add(
        "--out", type=cli.anywhere, help="JSON card (default: beside the samples), or new reference"
    )
    parser.add_processes()
    args = parser.parse_args(argv[1:])
    task = next(name for name in TASKS if getattr(args, name) is not None)
    required, optional = TASKS[task]
    if not getattr(args, required):
        raise UserError(f"--{required} is missing, which --{task} requires")
    for name in (
        "reference", "images", "features", "dinov2", "num_samples", "out", "keep_features"
    ):  # fmt: skip
        if getattr(args, name) is not None and name not in (required, *optional):
            raise UserError(f"--{name} is not for --{task}")
    return args, task


def chosen_features(args) -> list[str]:
    """The values of --features. Raises UserError for --dinov2 without them."""
    features = args.features.split(",") if args.features else ["inception"]
    if args.dinov2 and "dinov2" not in features:
        raise UserError("--dinov2 is for --features=dinov2")
    return features


def evaluate(args) -> None:
    """Measure samples against a reference."""
    features = chosen_features(args)
    labelled = "classifier" in features
    out = output_path(args.out, ".json") if args.out else None
    samples = open_images(args.samples, args.image_size, labelled, args.num_samples, generated=True)
    if out is None and (samples.path.endswith(".npz") or samples.note is not None):
        out = output_path(f"{samples.path.rstrip('/')}.json", ".json")
    reference = references.load(args.reference, args.image_size, labelled)
    evaluator = Evaluator(reference, features, args.inception or "", args.dinov2 or "")
    evaluator.check(samples)
    settings = {
        "samples": describe_images(samples),
        "reference": describe_reference(reference),
        "features": [network.note for network in evaluator.networks.values()],
        "neighbours": NEIGHBOURS,
    }
    hosts.agree(settings)
    print_summaries(samples, reference.images)
    caches = {}
    if out is not None and any(name in SLOW for name in features):
        folder = out.with_name(f"{out.name}.features")
        for name in ("samples", "reference"):
            of = {"of": settings[name], "by": settings["features"]}
            if labelled:  # the classifier is trained on the reference
                of["reference"] = settings["reference"]
            caches[f"{name}_cache"] = FeatureCache(folder / name, of)
    with locked(out):
        metrics = evaluator.measure(samples, **caches, progress=True)
        if is_first():
            report(f"{samples.path} against {reference.path}:", metrics, settings, out)
            for cache in () if args.keep_features else caches.values():
                cache.remove()


def make_reference(args) -> None:
    """Write the statistics of real images, and some of the images."""
    out = output_path(args.out, ".npz")
    images = open_images(args.make_reference, args.image_size)
    features = chosen_features(args)
    others = [name for name in features if name not in SLOW]
    if others:
        raise UserError(f"--make_reference takes --features of {', '.join(SLOW)}, not {others[0]}")
    if files.exists(out) and not any(mu in read_headers(out) for mu, _ in STATISTICS.values()):
        raise UserError(f"--out={out} exists and is no reference; choose another name")
    if len(images) < 2:
        raise UserError(f"{images.path} has one image; statistics need at least two")
    networks = []
    if "inception" in features:
        networks.append(load_inception(args.inception or ""))
    if "dinov2" in features:
        networks.append(load_dinov2(args.dinov2 or ""))
    print_summaries(images)
    settings = {"of": describe_images(images), "by": [network.note for network in networks]}
    cache = FeatureCache(out.with_name(f"{out.name}.features"), settings)
    with locked(out):
        extracted = extract(networks, images, cache, progress=True)
        if extracted is not None:
            references.save(out, extracted, references.images_to_keep(images))
            cache.remove()
            print_result(f"wrote the statistics of {len(images)} images to {out}")


def evaluate_vae(args) -> None:
    """Measure what a VAE loses of images."""
    out = output_path(args.out, ".json") if args.out else None
    # Latents stay as the encoder gives them.
    vae = Vae.load(args.vae, scale=1.0, shift=(), std=())
    images = open_images(args.images, args.image_size, num=args.num_samples)
    inception = load_inception(args.inception) if args.inception else None
    check_reconstructible(vae, images)
    print_summaries(images)
    settings = {
        "vae": args.vae,
        "vae_sha256": vae.sha256,
        "latents": "the mean of the posterior",
        "uint8": UINT8_RULE,
        "images": describe_images(images),
        "features": [inception.note] if inception else [],
    }
    with locked(out):
        metrics = measure_vae(vae, images, inception, progress=True)
        if is_first():
            report(f"{images.path} through {args.vae}:", metrics, settings, out)
            if inception is None:
                print_result("no rFID: --inception=FILE was not given")


def output_path(text: str, suffix: str) -> files.Path:
    """A file to be written. Raises UserError for another suffix, or if it cannot be written."""
    out = files.as_path(text)
    if out.suffix != suffix:
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use {suffix}")
    check_writable(out)
    return out


def locked(out: files.Path | None) -> contextlib.AbstractContextManager:
    """No other command writes this file meanwhile. Raises UserError if one does."""
    return contextlib.nullcontext() if out is None else hosts.alone(locks.beside(out), str(out))


def print_summaries(*image_sets: StoredImages | None) -> None:
    """Print which image files are used, and which are left out."""
    for images in image_sets:
        if images is not None and images.summary:
            log0(images.summary)


def main(argv: list[str]) -> None:
    """Parse the flags, and run the task."""
    args, task = parse(argv)
    cli.start(args)
    {"samples": evaluate, "make_reference": make_reference, "vae": evaluate_vae}[task](args)


if __name__ == "__main__":
    cli.run(main)
