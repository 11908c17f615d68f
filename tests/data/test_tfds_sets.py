"""A set that TFDS itself prepared, in a process where TensorFlow cannot be imported."""

import os
import subprocess
import sys

import pytest

from mdt_jax.data import tfds_sets
from mdt_jax.runtime.errors import UserError
from tests.conftest import ROOT

PREPARE = """
import importlib.abc, io, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError(name, name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "tensorflow" else found(name, *a)
sys.meta_path.insert(0, Without())

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from mdt_jax.data import tfds_sets
from mdt_jax.runtime.errors import UserError

def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((9, 7, 3), value, np.uint8)).save(file, "PNG")
    file.seek(0)
    return file

class TinyShapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["square", "circle"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            yield i, {"image": png(20 * i), "label": i % 2}

folder = sys.argv[1]
TinyShapes(data_dir=folder, file_format="array_record").download_and_prepare()
"""

CODE = (
    PREPARE
    + """
for name in ("tiny_shapes", f"{folder}/tiny_shapes/1.0.0"):
    found = tfds_sets.load(name, "train")
    assert len(found) == 10 and found.classes == ["square", "circle"]
    for i in range(10):
        file, label = found.read(i)
        image = Image.open(file)
        assert image.size == (7, 9) and image.getpixel((3, 3))[0] // 20 % 2 == label
from mdt_jax.evaluation import image_sets
images = image_sets.open_images(f"tfds:{folder}/tiny_shapes/1.0.0:train[:4]", labelled=True)
values = images.take(range(4))[:, 0, 0, 0] // 20
assert images.shape == (9, 7, 3) and len(images) == len(set(values.tolist())) == 4
named = [images.classes[label] for label in images.labels]
assert named == [["square", "circle"][value % 2] for value in values]
import os
os.mkdir(f"{folder}/empty")
for name, split, message in (
    ("tiny_shapes", "test", "no split 'test'; it has train"),
    ("imagenet2012", "train", "tfds build imagenet2012 --file_format=array_record"),
    ("no_such_set", "train", "TFDS has no set 'no_such_set'"),
    (f"{folder}/empty", "train", "TFDS has no set"),
):
    try:
        tfds_sets.load(name, split)
        raise SystemExit(f"{name} was loaded")
    except UserError as error:
        assert message in str(error), error
# What lies there is damaged, or names a module that is not TFDS's own.
import json, pathlib
whole = pathlib.Path(f"{folder}/tiny_shapes/1.0.0")
pathlib.Path(f"{folder}/stranger.py").write_text("raise SystemExit('a module of the set was run')")
sys.path.insert(0, folder)
features, info = ((whole / f"{name}.json").read_text() for name in ("features", "dataset_info"))
own = "tensorflow_datasets.core.features."
shards = next(whole.glob("*array_record*"))
for name, content, message in (
    ("features.json", features.replace(f"{own}image_feature", "stranger"), "not TFDS's own"),
    ("features.json", features.replace(f"{own}features_dict", "stranger"), "not TFDS's own"),
    ("features.json", json.dumps({"type": "stranger.X", "content": {}}), "not TFDS's own"),
    ("features.json", features[:50], "is damaged"),
    ("features.json", "[" * 100_000, "is damaged"),
    ("features.json", "null", "is damaged"),
    ("dataset_info.json", info[:50], "is damaged"),
    ("dataset_info.json", "[]", "is damaged"),
    ("dataset_info.json", info.replace("1.0.0", "x"), "is damaged"),
    (shards.name, "", "record 0 is damaged"),
    (shards.name, "x" * shards.stat().st_size, "record 0 is damaged"),
):
    before = (whole / name).read_bytes()
    (whole / name).write_text(content)
    try:
        tfds_sets.load(str(whole), "train").read(0)
        raise SystemExit(f"{name} of {content[:50]} was read")
    except UserError as error:
        assert message in str(error) and len(str(error).splitlines()) == 1, (message, error)
    (whole / name).write_bytes(before)
assert tfds_sets.load(str(whole), "train").read(0)
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
print("done")
"""
)


def test_it_is_read_without_tensorflow(tmp_path):
    (tmp_path / "tiny.py").write_text(CODE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "tiny.py"), str(tmp_path / "data")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "TFDS_DATA_DIR": str(tmp_path / "data"),
        },
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


REFUSED = """
import sys
from mdt_jax.data import tfds_sets
from mdt_jax.runtime.errors import UserError
try:
    tfds_sets.load("mnist", "train")
except UserError as error:
    print(str(error)[:13], "tensorflow_datasets" in sys.modules)
"""


def test_a_refused_folder_is_not_remembered():
    """TFDS reads the variable once, when it is imported."""
    command = [sys.executable, "-c", REFUSED]
    env = {**os.environ, "TFDS_DATA_DIR": "az://bucket/sets"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout == "TFDS_DATA_DIR False\n", done.stderr


def test_a_url_that_is_not_read_is_refused(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "az://bucket/sets")
    with pytest.raises(UserError, match="^TFDS_DATA_DIR: az://bucket/sets is a URL, and .*$"):
        tfds_sets.load("mnist", "train")
