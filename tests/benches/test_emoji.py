"""benchmarks/emoji.py on a package of a few images, with the layout of the published one."""

import base64
import hashlib
import importlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import folders
from tests.conftest import ROOT, exits_with_one_line, run_here, train_here

# Code points, name, category. Those of an astronaut differ from a rocket's by a person.
EMOJI = [
    ("1F600", "grinning", "Smileys & Emotion"),
    ("1F3C3", "runner", "People & Body"),
    ("1F3C3-200D-2640-FE0F", "woman-running", "People & Body"),
    ("1F3C3-200D-2642-FE0F-200D-27A1-FE0F", "man-running-right", "People & Body"),
    ("1F469-200D-1F680", "female-astronaut", "People & Body"),
    ("1F9D1-200D-1F680", "astronaut", "People & Body"),
    ("1F430", "rabbit", "Animals & Nature"),
    ("1F34E", "apple", "Food & Drink"),
    ("1F680", "rocket", "Travel & Places"),
    ("26BD", "soccer", "Activities"),
    ("1F511", "key", "Objects"),
    ("2795", "heavy_plus_sign", "Symbols"),
    ("1F1F3-1F1F4", "flag-no", "Flags"),
    ("1F3FB", "skin-tone-2", "Component"),
]
TRAIN = {
    "flags/flag-no", "food/apple", "objects/key", "people/man-running-right", "people/runner",
    "people/woman-running", "smileys/grinning",
}  # fmt: skip
TEST = {
    "activities/soccer", "animals/rabbit", "people/astronaut", "people/female-astronaut",
    "symbols/heavy_plus_sign", "travel/rocket",
}  # fmt: skip
MODES = ("RGBA", "LA", "P")


def drawn(number: int) -> Image.Image:
    """An image of two colours with a transparent border 8 wide, in one of the package's modes."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[8:56, 8:56] = [9 * number, 100, 200, 255]
    pixels[32:56, 8:56, 3] = 127
    image = Image.fromarray(pixels)
    mode = MODES[number % 3]
    return image.quantize(8) if mode == "P" else image.convert(mode)


def add(package: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"package/{name}")
    member.size = len(content)
    package.addfile(member, io.BytesIO(content))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The package. Its list is not in order; the first emoji has a skin tone, the last a twin."""
    path = tmp_path_factory.mktemp("package") / "package.tgz"
    entries = [
        {"unified": points, "short_name": name, "category": category, "sort_order": number,
         "image": f"{points.lower()}.png"}
        for number, (points, name, category) in enumerate(EMOJI)
    ]  # fmt: skip
    entries[1]["skin_variations"] = {"1F3FB": {"unified": "1F3C3-1F3FB", "image": "tone.png"}}
    norway = entries[12]
    twin = {"unified": "1F1F8-1F1EF", "short_name": "flag-sj", "sort_order": 99, "image": "sj.png"}
    entries = [norway | twin, *entries]
    with tarfile.open(path, "w:gz") as package:
        add(package, "img/google/sheets/64.png", b"no sheet is read")
        add(package, "img/google/64/tone.png", png(drawn(20)))
        add(package, "img/google/64/sj.png", png(drawn(12)))
        for number, entry in enumerate(entries[1:]):
            add(package, f"img/google/64/{entry['image']}", png(drawn(number)))
        add(package, "emoji.json", json.dumps(entries).encode())
    return path


@pytest.fixture
def emoji(archive, monkeypatch):
    """The bench, with the small package's checksum."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("emoji")
    digest = hashlib.sha512(archive.read_bytes()).digest()
    monkeypatch.setattr(module, "SHA512", base64.b64encode(digest).decode())
    return module


def names(folder):
    return {str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/*.png")}


def test_the_folders_and_the_recipe(emoji, archive, tmp_path):
    """The bench makes what the recipe trains on, and measures with."""
    (tmp_path / "emoji").mkdir()  # an empty folder is not in the way
    printed = run_here(emoji.bench, f"--archive={archive}", cwd=tmp_path)
    assert os.listdir(tmp_path) == ["emoji"]
    train, test = tmp_path / "emoji" / "train", tmp_path / "emoji" / "test"
    assert (names(train), names(test)) == (TRAIN, TEST)
    assert "| people | 3 | 2 |\n" in printed and "| all | 7 | 6 |\n" in printed
    assert folders.load(train).classes == sorted({name.split("/")[0] for name in TRAIN})

    workdir = tmp_path / "run"
    train_here(
        f"--config={ROOT}/configs/emoji.py:smoke", f"--workdir={workdir}",
        "--config.data.name=folder", f"--config.data.path={train}", "--config.data.image_size=32",
        "--config.data.channels=3", "--config.data.batch_size=4",
        f"--config.evaluation.reference={test}",
    )  # fmt: skip
    report = json.loads((workdir / "report.json").read_text())
    assert np.isfinite(report["frechet_distance"])
    assert np.load(workdir / "samples.npz")["arr_0"].shape == (20, 32, 32, 3)


def test_images_are_on_white(emoji, archive, tmp_path):
    run_here(emoji.bench, f"--archive={archive}", f"--out={tmp_path / 'deep' / 'out'}")
    folder = tmp_path / "deep" / "out"
    grey = round(np.dot([9, 100, 200], [0.299, 0.587, 0.114]))  # of runner, whose mode is LA
    for name, colour in (
        ("train/smileys/grinning", [0, 100, 200]),
        ("train/people/runner", [grey] * 3),
        ("train/people/woman-running", [18, 100, 200]),
    ):
        image = Image.open(folder / f"{name}.png")
        pixels = np.asarray(image).astype(int)
        assert image.mode == "RGB" and pixels.shape == (64, 64, 3)
        assert (pixels[:8] == 255).all() and (pixels[:, 56:] == 255).all()
        np.testing.assert_allclose(pixels[20, 20], colour, atol=1)
        half = 255 + 127 / 255 * (np.array(colour) - 255)
        np.testing.assert_allclose(pixels[40, 20], half, atol=1)


def test_mistakes_are_one_line(emoji, archive, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    damaged = archive.with_name("damaged.tgz")
    damaged.write_bytes(archive.read_bytes()[:-9])
    monkeypatch.setattr(emoji, "URL", "http://127.0.0.1:9/package.tgz")

    def fails(*flags):
        return exits_with_one_line(emoji.bench, flags, capsys, monkeypatch)

    assert "taken exists and is not empty" in fails(f"--out={taken}", f"--archive={archive}")
    assert "its SHA-512 is" in fails(f"--out={out}", f"--archive={damaged}")
    assert "none.tgz" in fails(f"--out={out}", f"--archive={tmp_path / 'none.tgz'}")
    assert "give the file: --archive=FILE" in fails(f"--out={out}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(emoji, archive, tmp_path, capsys, monkeypatch):
    count, save = 0, Image.Image.save

    def full(*arguments, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        save(*arguments, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    flags = [f"--out={tmp_path / 'out'}", f"--archive={archive}"]
    assert "No space left" in exits_with_one_line(emoji.bench, flags, capsys, monkeypatch)
    assert not list(tmp_path.iterdir())
