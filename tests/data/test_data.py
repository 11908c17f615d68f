import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import images, sources
from mdt_jax.runtime.errors import UserError
from tests.conftest import ROOT


@pytest.mark.parametrize("name, total, size", [("digits", 1797, 8), ("mnist", 5000, 28)])
def test_sources(name, total, size):
    train, held_out = sources.load(name)
    assert len(train) + len(held_out) == total
    assert len(held_out) == pytest.approx(0.2 * total, abs=3)
    for part in (train, held_out):
        assert part.images.dtype == np.uint8 and part.images.shape[1:] == (size, size, 1)
        assert part.images.min() == 0 and part.images.max() == 255
        assert sorted(set(part.labels.tolist())) == list(range(10))
    counts = np.bincount(held_out.labels) / np.bincount(np.r_[train.labels, held_out.labels])
    np.testing.assert_allclose(counts, 0.2, atol=0.01)
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in held_out.images) <= 1
    again = sources.load(name)[1]
    np.testing.assert_array_equal(again.images, held_out.images)


def test_the_digits_are_scikit_learns():
    """Read without importing it, which takes longer than all else that a small run begins with."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    ours = sources.PACKAGED["digits"]()
    levels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(ours.images, levels)
    np.testing.assert_array_equal(ours.labels, labels)


def test_a_part_of_the_digits_counts_its_classes_from_zero():
    whole, held_out = sources.load("digits")
    for name, first in (("digits_0_4", 0), ("digits_5_9", 5)):
        train, test = sources.load(name)
        assert sorted(set(train.labels)) == sorted(set(test.labels)) == [0, 1, 2, 3, 4]
        among = (whole.labels >= first) & (whole.labels < first + 5)
        among_held_out = (held_out.labels >= first) & (held_out.labels < first + 5)
        assert len(train) + len(test) == among.sum() + among_held_out.sum()


def test_unknown_source():
    with pytest.raises(UserError, match="cifar.*choose one of digits, .*, mnist"):
        sources.load("cifar")


def test_mirror_images():
    train, _ = sources.load("digits")
    items, u = np.arange(64), np.random.default_rng(0).random(64)
    plain = train.take(items, u)["images"]
    flipped = dataclasses.replace(train, flip=True).take(items, u)["images"]
    for image, other, draw in zip(plain, flipped, u, strict=True):
        np.testing.assert_array_equal(other, image[:, ::-1] if draw < 0.5 else image)


def test_pixels_there_and_back():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    back = images.to_uint8(images.to_float(every))
    assert np.abs(back.astype(int) - every).max() <= 1  # truncation, as published
    np.testing.assert_array_equal(
        images.to_uint8([-2, -1, 0, 0.9999, 1, 5]), [0, 0, 127, 254, 255, 255]
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels):
    samples = np.full((5, 8, 8, channels), 200, np.uint8)
    images.save_grid(str(tmp_path / "grid.png"), samples, columns=3)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape[:2] == (2 * 32 + 4, 3 * 32 + 2 * 4)
    assert picture[0, 0].min() == 200 and picture[-1, -1].max() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_data_never_imports_jax():
    code = "import sys, mdt_jax.data.sources, mdt_jax.data.images; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
