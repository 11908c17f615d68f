"""Masked Diffusion Transformers (MDT) in JAX and Flax.

run = mdt_jax.load("runs/digits")  # model, params = run
samples = mdt_jax.generate(*run, labels=[0, 1, 2], options=run.options)
images = run.to_images(samples)

    load(path, …) → Run: (model, params), with options, classes and VAE
    generate(model, params, labels, …) → samples [N, H, W, C] float32
    trajectory, interpolate_noise, interpolate_classes: rows of them
    inpaint(model, params, images, hidden, labels, …) → complete images
    to_uint8(samples) → images [N, H, W, C] uint8
    fid(samples, reference, inception, …) → float
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdt_jax.data.images import to_uint8
    from mdt_jax.diffusion.options import SampleOptions
    from mdt_jax.evaluation.evaluator import fid
    from mdt_jax.models.mdt import MDT
    from mdt_jax.runtime.errors import UserError
    from mdt_jax.sampling.generation import generate
    from mdt_jax.sampling.inpainting import InpaintOptions, inpaint
    from mdt_jax.sampling.interpolation import interpolate_classes, interpolate_noise, trajectory
    from mdt_jax.sampling.runs import Run, load

__version__ = "0.1.0"

_PUBLIC = {
    "InpaintOptions": "mdt_jax.sampling.inpainting",
    "MDT": "mdt_jax.models.mdt",
    "Run": "mdt_jax.sampling.runs",
    "SampleOptions": "mdt_jax.diffusion.options",
    "UserError": "mdt_jax.runtime.errors",
    "fid": "mdt_jax.evaluation.evaluator",
    "generate": "mdt_jax.sampling.generation",
    "interpolate_classes": "mdt_jax.sampling.interpolation",
    "interpolate_noise": "mdt_jax.sampling.interpolation",
    "load": "mdt_jax.sampling.runs",
    "to_uint8": "mdt_jax.data.images",
    "trajectory": "mdt_jax.sampling.interpolation",
}
__all__ = [
    "InpaintOptions",
    "MDT",
    "Run",
    "SampleOptions",
    "UserError",
    "fid",
    "generate",
    "inpaint",
    "interpolate_classes",
    "interpolate_noise",
    "load",
    "to_uint8",
    "trajectory",
]


def __getattr__(name: str):
    # Loaded on first use, so that `mdt_jax.data` can be imported without JAX.
    if name == "inpaint":  # the command's module, which can be called like the function
        return importlib.import_module("mdt_jax.inpaint")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mdt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
