"""Keys of random numbers: one for each purpose of a seed."""

import jax
import numpy as np
import pytest

from mdt_jax.diffusion.options import random_labels
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime import keys
from mdt_jax.sampling import engine, generation, inpainting
from tests.conftest import ROOT

SEEDS = (0, 1, 2, 3, 7, 2**31 - 1)


def bits(key) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.atleast_2d(jax.random.key_data(key)).tolist()]


def test_no_key_of_a_seed_serves_two_purposes():
    """Nor is one that is folded out of the key of another purpose: a step's, or a sample's."""
    of_seeds = [key for seed in SEEDS for key in bits(keys.key(seed))]
    of_purposes = [
        key for s in SEEDS for purpose in keys.Purpose for key in bits(keys.of(s, purpose))
    ]
    folded = [
        key
        for seed in SEEDS
        for purpose in keys.Purpose
        for key in bits(
            jax.vmap(jax.random.fold_in, (None, 0))(keys.of(seed, purpose), np.arange(1000))
        )
    ]
    every = [*of_seeds, *of_purposes, *folded]
    assert len(of_purposes) == len(SEEDS) * len(keys.Purpose) and len(keys.Purpose) >= 4
    assert len(set(every)) == len(every)


def test_nothing_is_drawn_with_the_key_of_a_seed():
    """Outside of mdt_jax/runtime/keys.py it only stands for a key where shapes are found."""
    for path in (ROOT / "mdt_jax").rglob("*.py"):
        uses = [line for line in path.read_text().splitlines() if "keys.key" in line]
        assert all("keys.key(0)" in line or "eval_shape" in line for line in uses), path


@pytest.mark.parametrize("seed", SEEDS)
def test_training_and_initialisation_keep_their_keys(seed):
    """Before there were purposes they were the halves of the seed's key."""
    halves = jax.random.split(keys.key(seed))
    ours = [keys.of(seed, purpose) for purpose in (keys.Purpose.TRAINING, keys.Purpose.INIT)]
    assert bits(halves) == [key for one in ours for key in bits(one)]


def test_samples_and_inpainting_draw_from_keys_of_their_own(monkeypatch):
    """Not from the seed's, whose first two draws are the keys of training and initialisation."""
    model = MDT(input_size=(4, 4), in_channels=1, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=3)  # fmt: skip
    params, how = init_params(model, keys.key(9)), dict(seed=5, num_steps=2)
    assert bits(generation.request(model, params, [0], **how).on_devices()[2]) == bits(
        keys.of(5, keys.Purpose.SAMPLES)
    )
    seen = []

    def start(program, batch, start=engine.start):
        seen.extend(bits(batch.key))
        return start(program, batch)

    monkeypatch.setattr(engine, "start", start)
    hidden, repaint = np.eye(4, dtype=bool), inpainting.InpaintOptions(num_resamples=1)
    inpainting.inpaint(model, params, np.zeros((1, 4, 4, 1)), hidden, [0], how=repaint, **how)
    assert seen == bits(keys.of(5, keys.Purpose.INPAINTING))


def test_random_labels_do_not_come_from_the_order_of_an_epoch():
    """NumPy's generator of (seed, 10) is that of epoch 10."""
    labels = random_labels(50, 10, seed=3)
    assert (labels != np.random.default_rng([3, 10]).integers(10, size=50, dtype=np.int32)).any()
