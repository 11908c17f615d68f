"""ADM's crop against a second writing of its description, byte for byte."""

import math

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import crops
from mdt_jax.data.images import to_rgb


def reference(image, size):
    """Halved by averaging 2×2 blocks as Pillow's box filter does, bicubic, the middle."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    short = min(width, height)
    new = (round(width * (size / short)), round(height * (size / short)))
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


SIDES = [1, 3, 17, 31, 32, 33, 63, 64, 65, 127, 300, 513]


@pytest.mark.parametrize("width", SIDES)
@pytest.mark.parametrize("height", SIDES)
def test_center_crop(width, height):
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    out = crops.center_crop(image, (32, 32))
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
    np.testing.assert_array_equal(out, reference(image, 32))


@pytest.mark.parametrize("width, height", [(1, 513), (700, 3), (17, 300), (2, 2), (40, 150)])
def test_a_long_picture_is_cut_before_it_is_enlarged(width, height, monkeypatch):
    y, x, channel = np.indices((height, width, 3))  # smooth: Pillow rounds and clips between axes
    waves = 128 + 100 * np.sin(y / 5 + channel) * np.cos(x / 7)
    image = Image.fromarray(waves.astype(np.uint8))
    whole = crops.center_crop(image, (32, 32)).astype(int)
    random = crops.random_crop(image, (32, 32), np.random.default_rng(3)).astype(int)
    monkeypatch.setattr(crops, "MAX_ENLARGED", 0)
    monkeypatch.setattr(Image.Image, "resize", watched := Watched(Image.Image.resize))
    assert np.abs(crops.center_crop(image, (32, 32)) - whole).max() <= 1
    cut = crops.random_crop(image, (32, 32), np.random.default_rng(3))
    assert np.abs(cut - random).max() <= 1
    assert watched.most <= 4 * 40**2  # the random crop is out of up to 40


class Watched:
    """PIL's resize, and the most pixels that it was asked for."""

    def __init__(self, resize):
        self.resize, self.most = resize, 0

    def __get__(self, image, _):
        def resize(size, **options):
            self.most = max(self.most, size[0] * size[1])
            return self.resize(image, size, **options)

        return resize


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (40, 700), (130, 61), (64, 96)])
@pytest.mark.parametrize("sides", [(32, 48), (48, 32), (32, 64)])
def test_a_crop_that_is_not_square_covers_its_sides(size, sides):
    """It is as large a part as its ratio allows, from the middle, without distortion."""
    width, height = size
    across, down = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    image = Image.fromarray(np.uint8(255 * np.stack([across, down, across], axis=-1)))
    out = crops.center_crop(image, sides).astype(float) / 255
    assert out.shape == (*sides, 3)
    scale = max(sides[0] / height, sides[1] / width)
    seen = sides[1] / (width * scale), sides[0] / (height * scale)
    assert max(seen) == pytest.approx(1.0)
    for channel, share in enumerate(seen):
        values = out[:, :, channel]
        assert abs(np.ptp(values) - share) < 0.08 and abs(values.mean() - 0.5) < 0.04
    for step in range(4):
        random = np.random.default_rng(step)
        assert crops.random_crop(image, sides, random).shape == (*sides, 3)


@pytest.mark.parametrize("crop", [crops.center_crop, crops.random_crop])
def test_the_memory_of_a_long_picture(crop, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", watched := Watched(Image.Image.resize))
    random = [np.random.default_rng(0)] * (crop is crops.random_crop)
    for size in ((1, 4000), (65_535, 1)):
        assert crop(Image.new("RGB", size, (9, 8, 7)), (256, 256), *random).tolist()[255][0] == [
            9,
            8,
            7,
        ]
    assert watched.most < 2**24


def test_a_random_crop_is_a_square_from_anywhere():
    row = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (128, 256, 3))
    image = Image.fromarray(np.ascontiguousarray(row))
    random = np.random.default_rng(0)
    firsts = []
    for _ in range(50):
        out = crops.random_crop(image, (32, 32), random)
        assert out.shape == (32, 32, 3)
        firsts.append(int(out[0, 0, 0]))
        steps = np.diff(out[0, :, 0].astype(int)).mean()  # pixels of the original for one of ours
        assert 128 / math.ceil(32 / 0.8) - 0.3 < steps < 128 / 32 + 0.3
    assert min(firsts) < 40 and max(firsts) > 90


@pytest.mark.parametrize(
    "mode, value, expected",
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 3), (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 99, (99, 99, 99)),
        ("I", 257 * 99, (99, 99, 99)),
    ],
)
def test_every_mode_becomes_rgb(mode, value, expected, tmp_path):
    image = Image.new(mode, (5, 4), value)
    out = to_rgb(image)
    assert out.mode == "RGB" and out.getpixel((2, 2)) == expected


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 70_000), ("I", -1)])
def test_pixels_of_no_known_range(mode, value):
    with pytest.raises(ValueError, match="its pixels"):
        to_rgb(Image.new(mode, (5, 4), value))


def test_a_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.info["transparency"] = 1
    assert to_rgb(image).getpixel((0, 0)) == (9, 8, 7)


def test_transparency_leaves_the_colours_alone(recwarn):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).quantize(8)
    image.info["transparency"] = bytes(range(8))
    palette = np.array(image.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), palette[np.asarray(image)])
    assert not recwarn.list
