"""Batch k as a pure function of (seed, k): resuming needs no iterator state."""

import functools

import numpy as np

from mdt_jax.data.images import to_float
from mdt_jax.data.sources import Images


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def batch_indices(seed: int, k: int, batch_size: int, size: int) -> np.ndarray:
    """Which of `size` images make up batch k: every image once an epoch, each epoch reshuffled.

    Epochs run on into each other: a batch may hold the end of one and the start of the next.
    """
    positions = np.arange(k * batch_size, (k + 1) * batch_size)
    epochs, offsets = np.divmod(positions, size)
    return np.array(
        [_epoch_order(seed, e, size)[o] for e, o in zip(epochs.tolist(), offsets, strict=True)]
    )


def batch(data: Images, seed: int, k: int, batch_size: int, flip: bool) -> dict[str, np.ndarray]:
    """{"latents": [B, H, W, C] float32 in [−1, 1], "labels": [B] int32}; `flip` mirrors half."""
    indices = batch_indices(seed, k, batch_size, len(data))
    images = to_float(data.images[indices])
    if flip:
        mirrored = np.random.default_rng([seed, k, 1]).random(batch_size) < 0.5
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return {"latents": images, "labels": data.labels[indices]}
