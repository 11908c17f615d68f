"""Between two classes, between two noises, and along the way from noise to sample."""

from collections.abc import Sequence
from numbers import Integral

import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.options import check_labels
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.generation import generate, request


def trajectory(
    model: MDT,
    params: dict,
    labels: Sequence[int] | np.ndarray,
    *,
    frames: int = 10,
    progress=False,
    **how,
) -> np.ndarray:
    """What the network takes the clean samples for, at `frames` moments of the way: x̂_0.

    how: as `generate` takes it. Returns [N, frames, H, W, C] float32; the last moment's are the
    samples. Raises UserError where there are fewer evaluations of the network than frames.
    """
    asked = request(model, params, labels, **how)
    evaluations = len(asked.options.guided_evaluations())
    if not isinstance(frames, Integral) or not 1 <= frames <= evaluations:
        raise UserError(f"frames is {frames}; of {evaluations} evaluations, 1 to all can be shown")
    shape = (0, frames, *model.input_size, model.in_channels)
    seen = [np.stack(x0, axis=1) for _, x0 in asked.batches(frames, progress)]
    return np.concatenate([np.zeros(shape, np.float32), *seen])


def interpolate_noise(
    model: MDT,
    params: dict,
    labels: Sequence[int] | np.ndarray,
    *,
    frames: int = 10,
    progress=False,
    **how,
) -> np.ndarray:
    """From sample n's noise to that of n + 1, for each label n, all steps' noise along with it.

    how: as `generate` takes it, but for numbers and with one guidance scale. Returns
    [N, frames, H, W, C] float32; both ends are what `generate` draws with that noise, whatever the
    sampler.
    """
    mix = _fractions(frames, how)
    check_labels(labels, model.num_classes)
    rows, numbers = len(labels), np.arange(len(labels)).repeat(frames)
    drawn = request(
        model, params, np.asarray(labels, np.int32).repeat(frames), numbers=numbers, to=numbers + 1,
        mix=np.tile(mix, rows), **how,
    )  # fmt: skip
    shape = (*model.input_size, model.in_channels)
    images = [np.zeros((0, *shape), np.float32)]
    images += [seen[-1] for _, seen in drawn.batches(progress=progress)]
    return np.concatenate(images).reshape(rows, frames, *shape)


def interpolate_classes(
    model: MDT, params: dict, labels: Sequence[int] | np.ndarray, *, frames: int = 10, **how
) -> np.ndarray:
    """From each of N labels to the next, along the line between their embeddings.

    how: as `generate` takes it, but for numbers and with one guidance scale. Returns
    [N − 1, frames, H, W, C] float32; row n has the noise of sample n. Raises UserError for fewer
    than two labels and for a model without classes.
    """
    mix = _fractions(frames, how)
    if not model.num_classes:
        raise UserError("the model is unconditional: there are no classes to go between")
    check_labels(labels, model.num_classes)
    if len(labels) < 2:
        raise UserError(f"{len(labels)} label: to go between classes takes two or more")
    rows = len(labels) - 1
    table = jnp.asarray(params["label_embed"]["table"]["embedding"])
    begin, end = (table[jnp.repeat(jnp.asarray(ids), frames)] for ids in (labels[:-1], labels[1:]))
    u = jnp.tile(mix, rows)[:, None]
    between = jnp.concatenate([(1 - u) * begin + u * end, table[-1:]])  # the null label is last
    params = {**params, "label_embed": {"table": {"embedding": between}}}
    images = generate(
        model.clone(num_classes=rows * frames), params, np.arange(rows * frames),
        numbers=np.arange(rows).repeat(frames), **how,
    )  # fmt: skip
    return images.reshape(rows, frames, *images.shape[1:])


def _fractions(frames: int, how: dict) -> np.ndarray:
    if "numbers" in how or np.ndim(how.get("guidance_scale", 0)):
        raise UserError("between two ends there are no numbers, and one guidance_scale")
    if not isinstance(frames, Integral) or frames < 2:
        raise UserError(f"frames is {frames}; from one end to the other takes 2 or more")
    return np.linspace(0, 1, frames, dtype=np.float32)
