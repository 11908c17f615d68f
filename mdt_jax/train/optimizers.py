"""Optimisers, as Optax transformations."""

import optax
from ml_collections import ConfigDict


def make_optimizer(optim: ConfigDict) -> optax.GradientTransformation:
    """AdamW as published: betas (0.9, 0.999), eps 1e-8, no weight decay, constant learning rate.

    optim.clip_norm > 0 first clips the gradient's global norm.
    """
    adamw = optax.adamw(optim.lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    if optim.clip_norm > 0:
        return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)
    return adamw
