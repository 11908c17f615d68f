"""The card of a measurement: metrics with all settings, as JSON and as a table."""

import json
import math

from mdt_jax import __version__
from mdt_jax.evaluation.image_sets import StoredImages
from mdt_jax.evaluation.references import Reference
from mdt_jax.runtime.files import Path, atomic_write
from mdt_jax.runtime.progress import print_result

TITLES = {
    "fid": "FID",
    "kid": "KID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "fd_dinov2": "FD-DINOv2",
    "kd_dinov2": "KD-DINOv2",
    "frechet_distance": "Fréchet distance",
    "frechet_distance_real": "that of real training images",
    "frechet_ratio": "the first over the second",
    "class_agreement": "class agreement",
    "classifier_accuracy": "the classifier's accuracy",
    "rfid": "rFID",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
}
SMALL = ("kid", "kd_dinov2")  # metrics of about 0.001


def describe_images(images: StoredImages) -> dict[str, object]:
    """Which images were measured, and how they were sampled if that is known."""
    return {
        "path": images.path,
        "sha256": images.sha256,
        "images": len(images),
        "shape": list(images.shape),
        "how": images.note,
    }


def describe_reference(reference: Reference) -> dict[str, object]:
    """The reference, and the number of images its statistics are of."""
    images = reference.images
    note: dict[str, object] = {
        "path": reference.path,
        "sha256": reference.sha256,
        "images": None if images is None else len(images),
    }
    for name, gaussian in reference.gaussians.items():
        note[f"statistics_{name}"] = gaussian.count or "of an unknown number of images"
    return note


def report(title: str, metrics: dict, settings: dict, out: Path | None) -> None:
    """Write the card to `out`, and print the table. Raises UserError."""
    if out is not None:  # written before anything is printed: the terminal may be closed by now
        write_card(out, metrics, settings)
    print_result(title)
    for name, value in metrics.items():
        if name in TITLES:
            digits = 6 if name in SMALL else 4
            print_result(f"{TITLES[name]:>30}  {value:.{digits}f}")
    print_result(f"{'images':>30}  {metrics.get('num_samples', metrics.get('num_images'))}")
    if out is None:
        print_result("no card with the settings: --out=FILE.json was not given")
    else:
        print_result(f"wrote these and all settings to {out}")


def write_card(out: Path, metrics: dict[str, float], settings: dict) -> None:
    """Write the whole card or nothing. Infinity and NaN become null. Raises UserError."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    card = {"mdt_jax": __version__, "measured": finite, **settings}
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
