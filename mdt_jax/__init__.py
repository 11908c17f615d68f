"""Masked Diffusion Transformers (MDT) in JAX and Flax.

model, params = mdt_jax.load("runs/digits")
images = mdt_jax.generate(model, params, labels=[0, 1, 2], guidance_scale=2.0)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdt_jax.data.images import to_uint8
    from mdt_jax.errors import UserError
    from mdt_jax.models.mdt import MDT
    from mdt_jax.sampling import generate
    from mdt_jax.walks import interpolate_classes, interpolate_noise, trajectory
    from mdt_jax.weights import load

__version__ = "0.1.0"

_PUBLIC = {
    "MDT": "mdt_jax.models.mdt",
    "UserError": "mdt_jax.errors",
    "generate": "mdt_jax.sampling",
    "interpolate_classes": "mdt_jax.walks",
    "interpolate_noise": "mdt_jax.walks",
    "load": "mdt_jax.weights",
    "to_uint8": "mdt_jax.data.images",
    "trajectory": "mdt_jax.walks",
}
__all__ = [
    "MDT",
    "UserError",
    "generate",
    "interpolate_classes",
    "interpolate_noise",
    "load",
    "to_uint8",
    "trajectory",
]


def __getattr__(name: str):
    # Loaded on first use, so that `mdt_jax.data` can be imported without JAX.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mdt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
