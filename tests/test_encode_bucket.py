"""Encoding to a bucket and training from it, in this process; and mistakes, one line each."""

import json

import pytest

from mdt_jax import encode, main
from tests.conftest import exits_with_one_line, run_here, train_here
from tests.encoding import SHARDS, arguments, content, make_place
from tests.small_data import write_tar


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("encode"))
    write_tar(folder / "pictures", folder / "pictures.tar")
    return folder


@pytest.fixture
def bucket(gcs, place):
    """A bucket with `cache` and `pictures.tar` of the place."""
    for name, written in content(place / "cache").items():
        gcs.write(f"cache/{name}", written)
    gcs.write("pictures.tar", (place / "pictures.tar").read_bytes())
    return gcs


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


STEPS = ["--config.train.steps=2", "--config.train.log_every=1", "--config.sample.num_samples=0",
         "--config.train.sample_every=0", "--config.train.checkpoint_every=2"]  # fmt: skip


@pytest.mark.parametrize("name, path", [("latents", "cache"), ("tar", "pictures.tar")])
def test_training_is_that_from_a_disk(name, path, bucket, place, tmp_path):
    argv = [*arguments(place, name, path), *STEPS]
    train_here(*argv, f"--workdir={tmp_path / 'here'}")
    bucket.set_faults(dict(method="GET", target="cache/latents|tar", status=503, times=2))
    train_here(*argv, f"--workdir={tmp_path / 'there'}", f"--config.data.path={bucket.root}/{path}")
    assert losses(tmp_path / "here") == losses(tmp_path / "there") != []


def test_from_a_bucket_to_a_bucket(bucket, place):
    images = [*arguments(place, "tar", "pictures.tar"), SHARDS]
    run_here(encode.main, *images, f"--out={place / 'of_tar'}")
    images += [f"--config.data.path={bucket.root}/pictures.tar", f"--out={bucket.root}/new/"]
    assert "52 images in 13 shards, 0 damaged" in run_here(encode.main, *images)
    written = {name[4:]: bucket.read(name) for name in bucket.objects("new/")}
    whole = content(place / "of_tar")
    assert written.keys() == whole.keys()
    for name in written.keys() - {"manifest.json"}:  # that tells the source
        assert written[name] == whole[name]
    assert "is sound: 52 images" in run_here(encode.main, *images, "--verify")


def test_a_cache_in_s3_is_written_and_verified_but_copied_to_train(
    s3, place, tmp_path, capsys, monkeypatch, in_root, keep_signals
):
    out = f"--out={s3.root}/cache"
    run_here(encode.main, *arguments(place), SHARDS, out)
    written = {name[6:]: s3.read(name) for name in s3.objects()}
    assert written == content(place / "cache")
    assert "is sound: 52 images" in run_here(encode.main, *arguments(place), out, "--verify")
    argv = [*arguments(place, "latents", "cache"), f"--config.data.path={s3.root}/cache"]
    argv += [f"--workdir={tmp_path / 'out'}"]
    said = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert f"aws s3 cp --recursive {s3.root}/cache cache" in said
    assert not (tmp_path / "out").exists()


ENCODE = {
    "no bucket": ("gs://no-such-bucket/c", {}, "there is no bucket gs://no-such-bucket"),
    "something else": ("ROOT/other", {}, "other is neither empty nor a cache of latents"),
    "an object": ("ROOT/other/thesis.txt", {}, "is a file, not a folder for latents"),
    "no permission": ("ROOT/new", {"status": 403, "method": "POST"}, "check the credentials and"),
    "no credentials": ("ROOT/new", {"status": 401}, "check the credentials and"),
    "another scheme": ("ftp://host/c", {}, "ftp://host/c is a URL"),
    "no name": ("gs:///c", {}, "write gs://BUCKET/NAME"),
    "another cache": ("ROOT/cache", {}, "holds another cache: its shard_images is 4, not 2048"),
}


@pytest.mark.parametrize("name", ENCODE)
def test_bad_encoding(name, bucket, place, capsys, monkeypatch, in_root):
    out, fields, message = ENCODE[name]
    bucket.write("other/thesis.txt", b"")
    before = bucket.objects()
    if fields:
        bucket.set_faults(dict(**fields))
    argv = [*arguments(place), f"--out={out.replace('ROOT', bucket.root)}"]
    assert message in exits_with_one_line(encode.main, argv, capsys, monkeypatch)
    bucket.set_faults()
    assert bucket.objects() == before


TRAIN = {
    "no cache": ("latents", "ROOT/none", {}, "holds no manifest.json"),
    "no bucket": ("latents", "gs://no-such-bucket/c", {}, "there is no bucket gs://no-such-bucket"),
    "no bucket of a tar": ("tar", "gs://no-such-bucket/c.tar", {}, "there is no bucket gs://no-"),
    "no tar": ("tar", "ROOT/none.tar", {}, "is no tar file"),
    "a folder": ("folder", "ROOT/pictures", {}, "copy it (gcloud storage cp -r gs://"),
    "no permission": ("latents", "ROOT/cache", {"status": 403, "method": "GET"}, "Forbidden"),
    "records": ("latents", "ROOT/cache", {"status": 403, "target": "record"}, "record cannot"),
    "no credentials": ("tar", "ROOT/pictures.tar", {"status": 401}, "pictures.tar cannot be read"),
}


@pytest.mark.parametrize("name", TRAIN)
def test_bad_training(name, bucket, place, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    kind, path, fields, message = TRAIN[name]
    argv = [*arguments(place, kind, "cache"), f"--workdir={tmp_path / 'out'}"]
    argv += [f"--config.data.path={path.replace('ROOT', bucket.root)}"]
    if kind == "folder":
        bucket.write("pictures/a.png", b"")
    if fields:
        bucket.set_faults(dict(**fields))
    assert message in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()
