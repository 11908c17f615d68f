"""Masked Diffusion Transformers (MDT) in JAX and Flax.

model, params = mdt_jax.load("runs/digits")
images = mdt_jax.generate(model, params, labels=[0, 1, 2], guidance_scale=2.0)
"""

import importlib

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
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # Loaded on first use, so that `mdt_jax.data` can be imported without JAX.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mdt_jax' has no attribute {name!r}")
