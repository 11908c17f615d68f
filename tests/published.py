"""The recorded numbers of the published code in tests/golden, in this project's layout (NHWC)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.guidance import guide
from mdt_jax.models.inception import Inception
from mdt_jax.models.mdt import MDT
from mdt_jax.train.step import Draws, Objective
from mdt_jax.weights import inception_names
from mdt_jax.weights.mdt_names import params_from_published

GOLDEN = pathlib.Path(__file__).parent / "golden"

_SHAPE = dict(input_size=(16, 16), in_channels=4, hidden_size=32, num_heads=2, num_classes=10)
MODELS = {
    "v1": MDT(**_SHAPE, depth=4),
    "v2": MDT(**_SHAPE, depth=6, version="v2"),
}
VERSIONS = tuple(MODELS)

OBJECTIVES = {
    "v1": Objective(),
    "v2": Objective(ratio=0.3, ratio_max=0.5, loss_weight="min_snr_5"),
}


def published_state(name: str) -> dict[str, np.ndarray]:
    """NAME.npz: arrays by published name."""
    return dict(np.load(GOLDEN / f"{name}.npz"))


def published_params(name: str) -> dict:
    """The parameters in NAME.npz, such as v1_state or v2_ema_after."""
    return params_from_published(published_state(name), MODELS[name.partition("_")[0]])


def zeros_like_published() -> dict[str, np.ndarray]:
    """The state_dict of FID's Inception, all zero."""
    model = Inception()
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), inception_names.shapes(model)
    )
    return inception_names.to_published(model, zeros)


@functools.cache
def published_numbers(version: str) -> dict[str, np.ndarray]:
    """Arrays of v1.npz or v2.npz; a channel axis moved last, integers as int32."""
    numbers = {}
    for name, array in np.load(GOLDEN / f"{version}.npz").items():
        if array.ndim >= 4:
            array = np.moveaxis(array, -3, -1)
        elif array.dtype == np.int64:
            array = array.astype(np.int32)
        numbers[name] = array
    return numbers


def published_step(version: str, i: int) -> tuple[dict, Draws]:
    """The batch and the draws of the recorded training step i, 0…4."""
    golden = published_numbers(version)
    batch = {
        "latents": jnp.asarray(golden["train_x0"][i]),
        "labels": jnp.asarray(golden["train_y"][i]),
    }
    draws = Draws(
        t=jnp.asarray(golden["train_t"][i]),
        noise_full=jnp.asarray(golden["train_noise_full"][i]),
        noise_masked=jnp.asarray(golden["train_noise_masked"][i]),
        drop_full=jnp.asarray(golden["train_labeldrop_full"][i] < 0.1),
        drop_masked=jnp.asarray(golden["train_labeldrop_masked"][i] < 0.1),
        mask_noise=jnp.asarray(golden["train_mask_noise"][i]),
        ratio_u=jnp.asarray(golden["train_ratio_u"][i] if version == "v2" else 0.0),
    )
    return batch, draws


def relative_error(got, expected) -> float:
    """‖got − expected‖/‖expected‖ over all arrays together, in float64."""
    got, expected = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (got, expected)
    )
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def random_arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 arrays of these shapes, of the scale of weights; the same on every machine."""
    random = np.random.RandomState(seed)
    return {
        name: (random.standard_normal(shape) * (0.5 / shape[-1] ** 0.5)).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def dit_numbers() -> dict[str, np.ndarray]:
    """dit.npz: inputs and outputs of the published DiT and SiT, NCHW."""
    return dict(np.load(GOLDEN / "dit.npz"))


def dit_state(name: str) -> dict[str, np.ndarray]:
    """The state_dict behind the numbers of "dit", "sit" or "dit_no_sigma"."""
    numbers = dit_numbers()
    names, shapes = (numbers[f"{name}_{each}"].tolist() for each in ("names", "shapes"))
    state = random_arrays(
        {n: tuple(map(int, s.split())) for n, s in zip(names, shapes, strict=True)}
    )
    return {n: state[n] for n in names} | {"pos_embed": numbers["pos_embed"]}


def guided_network(network, labels, null_label, weight, channels=3):
    """(x, t) → classifier-free guidance of network (x, t, y), both halves as one batch."""

    def guided(x, t):
        both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
        out = network(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        return guide(*jnp.split(out, 2), weight(t), channels)

    return guided
