"""Optimisers, as Optax transformations."""

import optax
from ml_collections import ConfigDict


def make_optimizer(optim: ConfigDict) -> optax.GradientTransformation:
    """AdamW as published: betas (0.9, 0.999), eps 1e-8, no weight decay, constant learning rate.

    optim.clip_norm > 0 first clips the gradient's global norm.
    """
    # The same state with and without clipping, so that a run can go on with it switched.
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm > 0 else optax.identity()
    return optax.chain(clip, optax.adamw(optim.lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0))
