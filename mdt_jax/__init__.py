"""Masked Diffusion Transformers (MDT) in JAX and Flax.

pipeline = mdt_jax.load("runs/digits")  # model, params = pipeline
samples = pipeline.generate([0, 1, 2])
images = pipeline.to_images(samples)

    load(path, …) → Pipeline: (model, params), with options, classes and VAE
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
    from mdt_jax.sampling.pipeline import Pipeline, Run, load

__version__ = "0.1.0"

_PUBLIC = {
    "InpaintOptions": "mdt_jax.sampling.inpainting",
    "MDT": "mdt_jax.models.mdt",
    "Pipeline": "mdt_jax.sampling.pipeline",
    "Run": "mdt_jax.sampling.pipeline",
    "SampleOptions": "mdt_jax.diffusion.options",
    "UserError": "mdt_jax.runtime.errors",
    "fid": "mdt_jax.evaluation.evaluator",
    "generate": "mdt_jax.sampling.generation",
    "interpolate_classes": "mdt_jax.sampling.interpolation",
    "interpolate_noise": "mdt_jax.sampling.interpolation",
    "load": "mdt_jax.sampling.pipeline",
    "to_uint8": "mdt_jax.data.images",
    "trajectory": "mdt_jax.sampling.interpolation",
}
__all__ = [
    "InpaintOptions",
    "MDT",
    "Pipeline",
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
