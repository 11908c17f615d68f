"""Training end to end from each source: the same pictures in every form give the same run."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mdt_jax import config as configs
from mdt_jax import convert, encode, sample
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.train import inputs
from mdt_jax.weights import kinds, networks
from tests.conftest import run_here, train_here
from tests.models.common import random_params
from tests.small_data import CLASSES, write_parquet, write_pictures, write_tar, write_vae


def prepare_tfds(pictures, data_dir):
    """The pictures as TFDS prepares a set; returns the folder of that."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class SmallPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, download):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n, path in enumerate(sorted(pictures.glob("*/*.jpg"))):
                yield n, {"image": str(path), "label": path.parent.name}

    builder = SmallPictures(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


SPEED = (
    "seconds", "images_per_second", "images_per_second_per_device", "tflops_per_device",
    "data_wait", "memory_gb", "eta_seconds", "compile_seconds",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    pictures = write_pictures(folder / "folder", 24)
    write_vae(folder / "vae")
    write_tar(pictures, folder / "tar")
    write_parquet(pictures, folder / "parquet")
    paths = sorted(path.relative_to(folder) for path in pictures.glob("*/*.jpg"))

    def number(path):
        return CLASSES.index(path.parent.name)

    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((p, number(p)) for p in paths)])
    (folder / "list.jsonl").write_text(
        "".join(json.dumps({"path": str(p), "label": 1 + number(p)}) + "\n" for p in paths)
    )
    (folder / "named").mkdir()
    for path in paths:
        (folder / "named" / f"{path.parent.name}_{path.name}").hardlink_to(folder / path)
    run_here(encode.main, *arguments(folder, "folder", "folder"), f"--out={folder / 'latents'}")
    # And sets with something wrong.
    shutil.copytree(pictures / "9", folder / "one" / "9")
    (folder / "wrong.csv").write_text("folder/2/000.jpg,12\nfolder/9/001.jpg,1\n")
    shutil.copytree(pictures, folder / "spoilt")
    for path in (folder / "spoilt").glob("*/*.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    wide = AutoencoderKL(channels=(8, 8), layers=1, groups=4)
    networks.save(folder / "wide", kinds.Weights(wide, random_params(wide)))
    return folder


def arguments(place, name, path):
    return [
        "--config=configs/xl2.py:smoke",
        f"--config.data.name={name}",
        f"--config.data.path={place / path}",
        "--config.data.image_size=32",
        "--config.data.channels=3",
        "--config.data.batch_size=8",
        "--config.model.num_classes=3",
        f"--config.vae.path={place / 'vae'}",
        "--config.vae.scale=1.0",
        "--config.train.steps=3",
        "--config.train.sample_every=3",
        "--config.sample.num_samples=10",
    ]


NO_SAMPLES = ("--config.train.sample_every=0", "--config.sample.num_samples=0")


def run(place, tmp_path, name, path, *more):
    """(metrics by step, what was printed) of a run."""
    workdir = tmp_path / "run"
    printed = train_here(*arguments(place, name, path), f"--workdir={workdir}", *more)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    report = json.loads((workdir / "report.json").read_text())
    assert report["steps"] == 3
    if NO_SAMPLES[0] not in more:
        images = np.load(workdir / "samples.npz")["arr_0"]
        assert images.dtype == np.uint8 and images.shape[0] == 10
        assert (workdir / "samples" / "0000003.png").exists() and report["num_samples"] == 10
    metrics = [json.loads(line) for line in lines]
    for line in metrics:
        for name in SPEED:
            del line[name]
    return metrics, printed


@pytest.fixture(scope="module")
def from_folder(place, tmp_path_factory):
    return run(place, tmp_path_factory.mktemp("run"), "folder", "folder")[0]


SOURCES = {
    "tar": ("tar", "tar"),
    "parquet": ("parquet", "parquet/train-*.parquet"),
    "parquet, workers": ("parquet", "parquet", "--config.data.workers=1"),
    "csv": ("folder", "list.csv"),
    "jsonl": ("folder", "list.jsonl"),
    "ClassID_ImgID": ("folder", "named"),
    "workers": ("folder", "folder", "--config.data.workers=1"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_run_from_each_source(source, place, from_folder, tmp_path):
    metrics, printed = run(place, tmp_path, *SOURCES[source], *NO_SAMPLES)
    names = {"csv": ["0", "1", "2"], "jsonl": ["1", "2", "3"]}.get(source, CLASSES)
    assert "classes: 0 = {}, 1 = {}, 2 = {}".format(*names) in printed
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == names
    assert metrics == from_folder


def test_tfds(place, from_folder, tmp_path):
    folder = prepare_tfds(place / "folder", tmp_path / "tfds")
    metrics, printed = run(place, tmp_path, "tfds", folder, "--config.data.workers=1", *NO_SAMPLES)
    assert metrics == from_folder and "0 = 2, 1 = 9, 2 = 10" in printed
    printed = train_here(
        *arguments(place, "tfds", folder), f"--workdir={tmp_path / 'no'}",
        "--config.data.split=test", expect=2,
    )  # fmt: skip
    assert "has no split 'test'; it has train" in printed


def test_latents_give_the_run_that_images_give(place, from_folder, tmp_path):
    metrics, _ = run(place, tmp_path, "latents", "latents", *NO_SAMPLES)
    for cached, online in zip(metrics, from_folder, strict=True):
        for name in ("loss", "loss/full", "loss/masked", "grad_norm"):
            assert cached[name] == pytest.approx(online[name], rel=2e-3)


def test_pixels_of_a_folder_without_classes(place, tmp_path):
    more = ["--config.vae.path=identity", "--config.model.num_classes=0"]
    more += ["--config.sample.guidance_scale=1.0", "--config.data.crop=random"]
    metrics, printed = run(place, tmp_path, "folder", "folder", *more)
    assert len(metrics) == 3 and "images without classes" in printed
    assert not (tmp_path / "run" / "classes.json").exists()


def test_a_run_goes_on_with_the_same_batches_and_classes(place, from_folder, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    argv = [*arguments(place, "folder", "folder"), *NO_SAMPLES]
    train_here(*argv, workdir, "--config.train.steps=2")
    assert run(place, tmp_path, "tar", "tar", *NO_SAMPLES)[0] == from_folder
    # Other images are said, and other classes under the same numbers are another set.
    more = shutil.copytree(place / "folder", tmp_path / "more")
    (more / "9" / "001.jpg").rename(more / "9" / "002.jpg")
    argv = [*arguments(place, "folder", more), *NO_SAMPLES, workdir, "--config.train.steps=4"]
    assert "resuming with another list of images than before" in train_here(*argv)
    other = shutil.copytree(place / "folder", tmp_path / "other")
    (other / "9").rename(other / "3")
    argv = [*arguments(place, "folder", other), workdir, "--config.train.steps=5"]
    printed = train_here(*argv, expect=2)
    assert "was trained with the classes 0 = 2, 1 = 9, 2 = 10; the data now has 0 = 2" in printed


def test_another_vae_under_the_same_path(place, tmp_path):
    """Refused when the run goes on, and said when it is sampled from."""
    shutil.copytree(place / "vae", tmp_path / "vae")
    argv = [*arguments(place, "folder", "folder"), f"--config.vae.path={tmp_path / 'vae'}"]
    argv += [*NO_SAMPLES, f"--workdir={tmp_path / 'run'}"]
    train_here(*argv, "--config.train.steps=1")
    run_here(convert.main, f"--src={tmp_path / 'run'}", f"--dst={tmp_path / 'weights'}")
    draw = ["--num_samples=2", "--num_steps=2", f"--out={tmp_path / 'out.png'}"]
    said = "was trained with another VAE than"
    assert said not in run_here(sample.main, f"--checkpoint={tmp_path / 'run'}", *draw)
    shutil.rmtree(tmp_path / "vae")
    write_vae(tmp_path / "vae", seed=1)
    printed = train_here(*argv, "--config.train.steps=2", expect=2)
    line = f"error: vae.path {tmp_path}/vae has changed since {tmp_path}/run was trained with it"
    assert line in printed.splitlines()[-1]
    for checkpoint in ("run", "weights"):
        assert said in run_here(sample.main, f"--checkpoint={tmp_path / checkpoint}", *draw)


def test_samples_by_the_names_of_the_classes(place, tmp_path):
    for number, name in zip(CLASSES, ("emu", "cat", "dog"), strict=True):
        shutil.copytree(place / "folder" / number, tmp_path / "zoo" / name)
    argv = arguments(place, "folder", tmp_path / "zoo")
    train_here(*argv, "--config.train.steps=1", f"--workdir={tmp_path / 'run'}")
    run_here(convert.main, f"--src={tmp_path / 'run'}", f"--dst={tmp_path / 'weights'}")
    for checkpoint in ("run", "weights"):
        labels = ["--labels=emu,0, dog", f"--checkpoint={tmp_path / checkpoint}"]
        out = tmp_path / f"{checkpoint}.npz"
        run_here(sample.main, *labels, "--num_steps=2", f"--out={out}")
        assert np.load(out)["arr_1"].tolist() == [2, 0, 1]
    labels[0] = "--labels=fox"
    printed = run_here(sample.main, *labels, f"--out={tmp_path / 'out.npz'}", expect=2)
    assert "nor a class of the run (e.g. cat)" in printed


BAD_DATA = {
    "nothing": (["--config.data.path=NONE"], "does not exist"),
    "one class": (["--config.data.path=PLACE/folder/9"], "has no labels"),
    "one folder": (["--config.data.path=PLACE/one"], "has a single class, and two are needed"),
    "a class too many": (["--config.model.num_classes=2"], "has 3 classes, but"),
    "large batch": (["--config.data.batch_size=32"], "24 images, fewer than data.batch_size 32"),
    "label": (["--config.data.path=PLACE/wrong.csv"], "label 12 of folder/2/000.jpg is out of"),
    "no tar": (["--config.data.name=tar"], "is no tar file"),
    "no set": (["--config.data.name=tfds", "--config.data.path=no_such_set"], "TFDS has no set"),
    "not prepared": (
        ["--config.data.name=tfds", "--config.data.path=cifar10"],
        "cifar10 is not prepared in",
    ),
    "other VAE": (["--config.vae.path=PLACE/wide"], "has latents of 4 channels at 1/2 of the size"),
    "damaged": (["--config.data.path=PLACE/spoilt"], "jpg cannot be read: Truncated File"),
}


def test_what_is_found_is_said_and_the_advice_is_right(place, tmp_path):
    argv = [*arguments(place, "folder", "folder"), *NO_SAMPLES]
    workdir = f"--workdir={tmp_path / 'run'}"
    said = f"folder {place}/folder: 24 images of 3 classes, 8 each"
    assert said in train_here(*argv, workdir)
    printed = train_here(*argv, workdir, "--config.model.num_classes=2", expect=2)
    assert printed.splitlines()[-1].endswith("; set it to 3, or to 0 to train without classes")
    shutil.copytree(place / "folder", tmp_path / "other")
    for path in (tmp_path / "other" / "10").iterdir():
        path.rename(path.with_suffix(".jfif"))
    argv += [f"--config.data.path={tmp_path / 'other'}"]
    of_encode = run_here(encode.main, *argv, f"--out={tmp_path / 'cache'}", expect=2)
    for printed in (train_here(*argv, workdir, expect=2), of_encode):
        (last,) = printed.splitlines()
        assert "unknown suffix .jfif: 8 (e.g. 10/002.jfif)" in last
        assert "but model.num_classes is 3; check whether the files left out (" in last
        assert "folder without images: 1 (10)) hold the others, or set it to 2, or to 0" in last


def test_what_images_lose_is_said(tmp_path, capsys):
    """The digits' recipe with a folder of photographs."""
    photographs = tmp_path / "photographs"
    for n in range(4):
        path = photographs / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 64), (200, 50 * n, 0)).save(path)

    def said(**changes):
        config = configs.default()
        config.model.num_classes = 2
        config.data.update(name="folder", path=str(photographs), batch_size=4, **changes)
        inputs.log_contents(config.data, inputs.open_data(config)[0])
        return capsys.readouterr().err

    printed, name = said(), f"warning: folder {photographs}: "
    assert f"{name}4 of 4 images sampled are in colour and become grey" in printed
    assert f"{name}images are shrunk 8 times: their median short side is 64 pixels" in printed
    assert "warning: folder" not in said(channels=3, image_size=32)
    for path in photographs.glob("*/*.png"):
        Image.new("RGB", (9, 8), (50, 50, 50)).save(path)  # grey, though stored in colour
    assert "warning: folder" not in said()


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name, place, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    more, message = BAD_DATA[name]
    more = [text.replace("PLACE", str(place)) for text in more]
    workdir = tmp_path / "run"
    printed = train_here(
        *arguments(place, "folder", "folder"), f"--workdir={workdir}", *more, expect=2
    )
    assert printed.splitlines()[-1].startswith("error: ") and message in printed
    assert not (workdir / "checkpoints").exists() or not any((workdir / "checkpoints").iterdir())
