"""A small network whose samples depend on every parameter, and requests for samples of it."""

import jax
import numpy as np

import mdt_jax

# Not clipped: tolerances are relative to the samples, which those of `load_lively` make large.
OPTIONS = dict(seed=3, num_steps=5, guidance_scale=2.0, clip_denoised=False)
LABELS = np.arange(70) % 10


def load_lively(path):
    """A smoke run's model with weights that matter: its own have barely left their start."""
    model, params = mdt_jax.load(path)
    leaves, tree = jax.tree.flatten(params)
    random = np.random.RandomState(0)
    leaves = [leaf + random.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves]
    return model, tree.unflatten(leaves)


def with_a_broken_class(params, label: int) -> dict:
    """The parameters with numbers in the embedding of one class that overflow in the network."""
    table = np.array(params["label_embed"]["table"]["embedding"])
    table[label] = 3e38
    return {**params, "label_embed": {"table": {"embedding": table}}}
