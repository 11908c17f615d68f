"""Images in buckets: tars and prepared TFDS sets are read in place, and folders are refused."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from mdt_jax.data import pipeline, sources, tars
from mdt_jax.data.crops import CroppedImages
from mdt_jax.data.protocols import Status
from mdt_jax.evaluation import image_sets
from mdt_jax.runtime import buckets, files
from mdt_jax.runtime.errors import UserError
from tests.conftest import ROOT
from tests.data.test_tars import imagenet  # noqa: F401 (a fixture)
from tests.data.test_tfds_sets import PREPARE
from tests.small_data import write_pictures, write_tar


@pytest.fixture
def tar(gcs, tmp_path):
    """(a tar in the bucket, the same on the disk)."""
    path = write_tar(write_pictures(tmp_path / "pictures", 24), tmp_path / "all.tar")
    gcs.write("sets/all.tar", path.read_bytes())
    return f"{gcs.root}/sets/all.tar", path


def test_a_tar_is_that_of_a_disk(gcs, tar, monkeypatch):
    here, there = tars.load(tar[1]), tars.load(tar[0])
    assert there.contents == here.contents and there.classes == here.classes
    assert there.name(3) == f"{tar[0]}:{here.names[3]}"
    assert gcs.objects() == ["sets/all.tar", "sets/all.tar.index.npz"]
    gcs.set_faults()
    monkeypatch.setattr(tars, "_scan", None)  # the index is kept
    again = pickle.loads(pickle.dumps(tars.load(tar[0])))
    items, u = np.arange(24)[::-1].copy(), np.linspace(0, 0.99, 24)
    expected = CroppedImages(here, (8, 8), crop="random", flip=True).take(items, u)
    for source in (there, again):
        found = CroppedImages(source, (8, 8), crop="random", flip=True).take(items, u)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    asked = [line for line in gcs.requests if line.endswith("all.tar?alt=media")]
    # The headers of the images and of the three tars around them, and twice each image.
    assert len(asked) == 24 + 3 + 2 * 24


def test_a_tar_is_measured_without_a_copy(tar, monkeypatch):
    here, there = (image_sets.open_images(str(path), 8, labelled=True) for path in reversed(tar))
    monkeypatch.setattr(files, "fetched", None)
    monkeypatch.setattr(buckets, "fetched", None)
    assert there.sha256 == here.sha256 and there.labels.tolist() == here.labels.tolist()
    np.testing.assert_array_equal(there.take(range(24)), here.take(range(24)))


def test_nested_tars(gcs, imagenet):  # noqa: F811
    gcs.write("imagenet.tar", imagenet.read_bytes())
    found, expected = tars.load(f"{gcs.root}/imagenet.tar"), tars.load(imagenet)
    assert found.contents == expected.contents
    for i in range(len(expected)):
        assert found.read(i)[0].read() == expected.read(i)[0].read()


def test_batches_of_worker_processes(tar):
    plan = pipeline.Shuffled(24, 0, 8, np.arange(8))
    here, there = (
        pipeline.batches(CroppedImages(tars.load(path), (8, 8)), plan, workers=2)
        for path in reversed(tar)
    )
    for _ in range(4):
        one, other = next(here), next(there)
        for name, values in one.items():
            np.testing.assert_array_equal(other[name], values)
    here.close()
    there.close()


@pytest.mark.parametrize("fields", [{"status": 503}, {"cut": "down"}, {"wait": 0.3}], ids=str)
def test_a_fault_that_passes_is_not_seen(gcs, tar, fields):
    source = CroppedImages(tars.load(tar[0]), (8, 8))
    gcs.set_faults(dict(**fields, target="all.tar", times=2))
    assert (source.take(np.arange(24), np.ones(24))["status"] == Status.READ).all()
    assert [each.times for each in gcs.faults] == [0]


def test_what_cannot_be_read_now_is_not_damaged(gcs, tar):
    source = CroppedImages(tars.load(tar[0]), (8, 8))
    for workers in (0, 1):
        gcs.set_faults(dict(status=403, target="all.tar"))
        with pytest.raises(UserError, match="the data cannot be read: .*all.tar.*Forbidden"):
            list(pipeline.batches(source, [(np.arange(8), np.ones(8))], workers=workers))
    with pytest.raises(UserError, match="all.tar cannot be read: Forbidden"):
        tars._scan(files.as_path(tar[0]))
    gcs.set_faults()
    gcs.remove("sets/all.tar")
    with pytest.raises(OSError, match="all.tar"):
        source.take(np.arange(8), np.ones(8))


def test_another_tar_of_the_same_name(gcs, tar):
    before = tars.load(tar[0])
    content = bytearray(gcs.read("sets/all.tar"))
    at = int(before.headers[5])
    content[at : at + 9] = b"9/abc.png"
    gcs.write("sets/all.tar", bytes(content))
    with pytest.raises(OSError, match=r"is another file than its index gs://.*npz describes"):
        before.read(5)
    with pytest.raises(UserError, match="is damaged"):
        tars.load(tar[0])


def test_a_bucket_that_only_reads_needs_no_index(gcs, tar, capsys):
    gcs.set_faults(dict(status=403, method="POST"))
    assert len(tars.load(tar[0])) == 24
    printed = capsys.readouterr().err
    assert "is read through once for the positions" in printed
    assert "all.tar is not kept: gs://" in printed and "Forbidden" in printed
    gcs.set_faults()
    assert gcs.objects() == ["sets/all.tar"]


def test_tars_in_s3(s3, tmp_path):
    path = write_tar(write_pictures(tmp_path / "pictures", 6), tmp_path / "all.tar")
    s3.write("all.tar", path.read_bytes())
    found, expected = tars.load(f"{s3.root}/all.tar"), tars.load(path)
    assert found.contents == expected.contents
    assert found.read(2)[0].read() == expected.read(2)[0].read()
    assert s3.objects() == ["all.tar", "all.tar.index.npz"]


class Data:
    """A config's `data`."""

    split, flip, image_size, channels, crop = "train", False, 8, 3, "center"

    def __init__(self, name, path):
        self.name, self.path = name, path


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("folder", "ROOT/train/", "copy it (gcloud storage cp -r ROOT/train train)"),
        ("folder", "ROOT/my set", "copy it (gcloud storage cp -r 'ROOT/my set' 'my set')"),
        ("folder", "ROOT/no", "data.path ROOT/no does not exist"),
        ("tar", "ROOT/shards-{000..100}.tar", "is no tar file"),
        ("latents", "s3://b/c", "copy the folder: aws s3 cp --recursive s3://b/c c"),
        ("tfds", "s3://b/c/1.0.0", "copy the folder: aws s3 cp --recursive s3://b/c/1.0.0 1.0.0"),
        ("tfds", "ROOT/c", "/c holds no dataset_info.json: give the folder of one version"),
    ],
)
def test_what_is_not_read_in_place(gcs, name, path, message):
    for folder in ("train", "my set"):
        gcs.write(f"{folder}/1.png", b"x")
    with pytest.raises(UserError) as error:
        sources.stored(Data(name, path.replace("ROOT", gcs.root)), 10)
    assert message.replace("ROOT", gcs.root) in str(error.value)


def test_folders_in_s3_are_copied(s3):
    s3.write("train/1.png", b"x")
    copy = rf"copy it \(aws s3 cp --recursive {s3.root}/train train\)"
    with pytest.raises(UserError, match=copy):
        sources.stored(Data("folder", f"{s3.root}/train"), 10)
    with pytest.raises(UserError, match="data.path .*/no does not exist"):
        sources.stored(Data("folder", f"{s3.root}/no"), 10)


def test_a_bucket_that_is_not_there(gcs):
    for name in ("latents", "tar", "tfds", "folder"):
        with pytest.raises(UserError, match="there is no bucket gs://no-such-bucket$"):
            sources.stored(Data(name, "gs://no-such-bucket/c"), 10)


TFDS = (
    PREPARE
    + """
from tests.gcs_protocol import Fault
from tests.bucket_servers import GcsServer
import pathlib, pickle

server = GcsServer(sys.argv[2], sys.argv[3])
for path in pathlib.Path(folder).rglob("*"):
    if path.is_file():
        server.write(f"sets/{path.relative_to(folder)}", path.read_bytes())
here = tfds_sets.load(f"{folder}/tiny_shapes/1.0.0", "train")
from mdt_jax.data.crops import CroppedImages
for name in ("tiny_shapes", f"{server.root}/sets/tiny_shapes/1.0.0"):
    found = tfds_sets.load(name, "train")
    found = pickle.loads(pickle.dumps(found))  # as for a worker
    assert found.in_bucket and found.contents == here.contents and found.classes == here.classes
    for i in range(10):
        (file, label), (other, number) = found.read(i), here.read(i)
        assert file.read() == other.read() and label == number
    server.set_faults(Fault(status=503, target="array_record", times=2))
    one, other = (
        CroppedImages(each, (8, 8)).take(np.arange(10), np.ones(10)) for each in (here, found)
    )
    assert all((one[key] == other[key]).all() for key in one) and not other["status"].any()
    assert server.faults[0].times == 0
    server.set_faults(Fault(status=403, target="array_record"))
    try:
        CroppedImages(tfds_sets.load(name, "train"), (8, 8)).take(np.arange(10), np.ones(10))
        raise SystemExit(f"{name} was read")
    except OSError as error:
        assert "reading gs://" in str(error), error
    server.set_faults(Fault(status=403, target="dataset_info"))
    try:
        tfds_sets.load(name, "train")
        raise SystemExit(f"{name} was loaded")
    except UserError as error:
        assert "Forbidden" in str(error) and "gs://" in str(error), error
    server.set_faults()
from mdt_jax.evaluation import image_sets
name = f"tfds:{server.root}/sets/tiny_shapes/1.0.0:train[:4]"
images = image_sets.open_images(name, labelled=True)
assert images.shape == (9, 7, 3) and len(images) == 4
try:
    tfds_sets.load("imagenet2012", "train")
    raise SystemExit("imagenet2012 was loaded")
except UserError as error:
    assert f"not prepared in {server.root}/sets/imagenet2012" in str(error), error
name = f"sets/tiny_shapes/1.0.0/tiny_shapes-train.array_record-00000-of-00001"
server.write(name, b"x" * len(server.read(name)))
found = tfds_sets.load("tiny_shapes", "train")
try:
    CroppedImages(found, (8, 8)).take(np.arange(10), np.ones(10))
    raise SystemExit("damage was read")
except UserError as error:
    assert "record 0 is damaged" in str(error), error
print("done")
"""
)


def test_a_prepared_set_is_read_without_tensorflow(gcs, tmp_path):
    (tmp_path / "tiny.py").write_text(TFDS)
    done = subprocess.run(
        [sys.executable, tmp_path / "tiny.py", tmp_path / "data", gcs.url, gcs.bucket],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **gcs.environment,
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "TFDS_DATA_DIR": f"{gcs.root}/sets",
        },
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
