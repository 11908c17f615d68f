"""Predictions on the way from noise to sample, and interpolation between noises and classes."""

import dataclasses
from numbers import Integral

import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.options import check_labels
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.generation import Labels, generate, request
from mdt_jax.sampling.noise import Noise


def trajectory(
    model: MDT,
    params: dict,
    labels: Labels,
    *,
    frames: int = 10,
    progress: bool = False,
    **sampling,
) -> np.ndarray:
    """Predicted clean samples x̂₀ at `frames` moments, evenly spaced over the denoising steps.

    sampling: as `generate` takes it. Returns [N, frames, H, W, C] float32; the last frame is the
    sample itself. Raises UserError for more frames than evaluations of the network.
    """
    drawn = request(model, params, labels, **sampling)
    evaluations = len(drawn.options.guided_evaluations())
    if not isinstance(frames, Integral) or not 1 <= frames <= evaluations:
        raise UserError(f"frames is {frames}; of {evaluations} evaluations, 1 to all can be shown")
    rows = [np.zeros((0, frames, *model.input_size, model.in_channels), np.float32)]
    for batch in drawn.batches(progress, frames=frames):
        rows.append(np.stack([*batch.predictions, batch.samples], axis=1))
    return np.concatenate(rows)


def interpolate_noise(
    model: MDT,
    params: dict,
    labels: Labels,
    *,
    frames: int = 10,
    progress: bool = False,
    **sampling,
) -> np.ndarray:
    """For each label n, interpolate from the noise of sample n to that of sample n + 1.

    The noise of all steps is interpolated (`slerp`). sampling: as `generate` takes it, except for
    numbers, and with one guidance scale. Returns [N, frames, H, W, C] float32; the first and the
    last frame equal the samples that `generate` draws with these noises.
    """
    mix = _fractions(frames, sampling)
    check_labels(labels, model.num_classes)
    rows = len(labels)
    numbers = np.arange(rows, dtype=np.int32).repeat(frames)
    noise = Noise(numbers, numbers + 1, np.tile(mix, rows))
    plain = request(model, params, np.asarray(labels, np.int32).repeat(frames), **sampling)
    images = dataclasses.replace(plain, noise=noise).draw(progress)
    return images.reshape(rows, frames, *images.shape[1:])


def interpolate_classes(
    model: MDT, params: dict, labels: Labels, *, frames: int = 10, **sampling
) -> np.ndarray:
    """Interpolate linearly from the embedding of each of N labels to that of the next.

    sampling: as `generate` takes it, except for numbers, and with one guidance scale. Returns
    [N − 1, frames, H, W, C] float32; row n has the noise of sample n. Raises UserError for fewer
    than two labels and for an unconditional model.
    """
    mix = _fractions(frames, sampling)
    if not model.num_classes:
        raise UserError("an unconditional model has no classes to interpolate between")
    if sampling.get("guide_network"):
        raise UserError("interpolation between classes takes no other network as guide")
    check_labels(labels, model.num_classes)
    if len(labels) < 2:
        raise UserError(f"{len(labels)} label; interpolating between classes takes two or more")
    rows = len(labels) - 1
    table = jnp.asarray(params["label_embed"]["table"]["embedding"])
    begin, end = (table[jnp.repeat(jnp.asarray(ids), frames)] for ids in (labels[:-1], labels[1:]))
    u = jnp.tile(mix, rows)[:, None]
    between = jnp.concatenate([(1 - u) * begin + u * end, table[-1:]])  # the null label is last
    params = {**params, "label_embed": {"table": {"embedding": between}}}
    images = generate(
        model.clone(num_classes=rows * frames), params, np.arange(rows * frames),
        numbers=np.arange(rows).repeat(frames), **sampling,
    )  # fmt: skip
    return images.reshape(rows, frames, *images.shape[1:])


def _fractions(frames: int, sampling: dict) -> np.ndarray:
    """[frames] float32 from 0 to 1. Raises UserError for arguments that do not interpolate."""
    if "numbers" in sampling or np.ndim(sampling.get("guidance_scale", 0)):
        raise UserError("interpolation takes no numbers, and one guidance_scale")
    if not isinstance(frames, Integral) or frames < 2:
        raise UserError(f"frames is {frames}; interpolation takes 2 or more")
    return np.linspace(0, 1, frames, dtype=np.float32)
