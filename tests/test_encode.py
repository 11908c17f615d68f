"""Images → latent cache → training: equal to encoding on the way, and to itself after kill -9."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import config as configs
from mdt_jax import encode, main
from mdt_jax.data import latents, latents_writer
from mdt_jax.models.autoencoder import LatentNorm
from mdt_jax.runtime import buckets, parallel
from mdt_jax.train import inputs
from mdt_jax.train.step import batch_latents
from mdt_jax.weights.picking import DIFFUSERS
from mdt_jax.weights.vae import Vae, recorded_norm
from tests.conftest import (
    exits_with_one_line,
    run_here,
    train_here,
)
from tests.encoding import IMAGES, SCALE, SHARDS, arguments, content, make_place
from tests.small_data import write_parquet, write_vae

ONE_STEP = [
    "--config.train.steps=1", "--config.train.sample_every=0", "--config.sample.num_samples=0"
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("encode"))


def config_of(folder, name="folder", path="pictures"):
    config = configs.variant(configs.default(), "smoke")
    config.data.update(name=name, path=str(folder / path), image_size=32, channels=3, flip=True)
    config.data.batch_size = 16
    config.model.num_classes = 3
    config.vae.update(path=str(folder / "vae"), scale=SCALE)
    configs.validate(config)
    return config


def test_where_things_lie_is_no_matter(place, tmp_path):
    """The same images and VAE by other paths go on with, and train on, the same cache."""
    pictures = shutil.copytree(place / "pictures", tmp_path / "pictures")
    moved = [f"--config.vae.path={place / 'moved' / 'vae'}"]
    argv = [*arguments(place), *moved, f"--config.data.path={pictures}/", SHARDS]
    assert "finished already" in encode_here(*argv, f"--out={place / 'cache'}")
    argv = [*arguments(place, "latents", "cache"), *moved, "--config.train.steps=1"]
    train_here(*argv, f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize("where", ["a folder", "a bucket", "a bucket, workers"])
def test_parquet_shards_give_the_cache_of_a_folder(where, place, tmp_path, request):
    """And nothing is unpacked, since encoding reads in order."""
    shards = tmp_path / "parquet"
    write_parquet(place / "pictures", shards, rows=7)
    before, argv = content(shards), arguments(place, "parquet", str(shards))
    if "bucket" in where:
        root = request.getfixturevalue("gcs").root
        buckets.client(root).put(str(shards), f"{root}/parquet", recursive=True)
        argv.append(f"--config.data.path={root}/parquet/train-*.parquet")
    if "workers" in where:
        argv.append("--config.data.workers=1")
    run_here(encode.main, *argv, f"--out={tmp_path / 'cache'}", SHARDS)
    found, expected = content(tmp_path / "cache"), content(place / "cache")
    assert found.pop("manifest.json") != expected.pop("manifest.json")  # the images have names
    assert found == expected and content(shards) == before


def test_another_host_is_quicker_with_the_same_part(place, tmp_path, monkeypatch):
    """It finishes the cache and tidies while a shard is written here: that is no failure."""
    write = latents_writer.CacheWriter.write

    def overtaken(making, shard, batches):
        def and_then_tidied():
            yield from batches
            for path in (place / "cache").iterdir():
                shutil.copy(path, making.folder)
            making._tidy()

        write(making, shard, and_then_tidied())

    monkeypatch.setattr(latents_writer.CacheWriter, "write", overtaken)
    out = tmp_path / "cache"
    printed = run_here(encode.main, *arguments(place), f"--out={out}", SHARDS)
    assert f"{out}: {IMAGES} images in 13 shards" in printed
    assert content(out) == content(place / "cache")


def test_the_number_of_classes_may_be_taken_from_the_data(place):
    argv = [*arguments(place), "--config.model.num_classes=-1", f"--out={place / 'cache'}"]
    assert "is finished already" in run_here(encode.main, *argv, SHARDS)


def test_what_a_cache_holds(place):
    manifest = json.loads((place / "cache" / "manifest.json").read_text())
    assert manifest["images"] == IMAGES and manifest["latents"] == [4, 4, 4]
    assert manifest["classes"] == ["2", "9", "10"] and manifest["scale"] == SCALE
    assert len(manifest["shards"]) == 13
    # Each record against the VAE itself, image by image.
    images, _ = inputs.open_data(config_of(place))
    images = dataclasses.replace(images, flip=False).take(np.arange(IMAGES), np.ones(IMAGES))
    vae = Vae.load(place / "vae")
    run = jax.jit(lambda x: vae.network.apply({"params": vae.params}, x, method="encode"))
    for flip, pixels in ((False, images["images"]), (True, images["images"][:, :, ::-1])):
        found = latents.load(place / "cache", flip).take(np.arange(IMAGES), np.zeros(IMAGES))
        mean, std = run(jnp.asarray(pixels, jnp.float32) / 127.5 - 1)
        np.testing.assert_allclose(found["mean"], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["std"], std, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(found["labels"], images["labels"])


def test_online_and_cached_training_see_the_same(place):
    """The images in the same order with the same mirrors; only the posterior's noise differs."""
    mesh = parallel.make_mesh()
    online, cached = config_of(place), config_of(place, "latents", "cache")
    streams = [
        inputs.feed(config, inputs.open_inputs(config), mesh, 0) for config in (online, cached)
    ]

    @jax.jit
    def draw(batch, key):
        noise = jax.random.normal(key, batch["mean"].shape)
        return batch_latents(batch, noise, LatentNorm(SCALE))

    drawn = {name: [] for name in ("online", "cached")}
    variance = []
    for k, (a, b) in enumerate(itertools.islice(zip(*streams, strict=True), 70)):
        np.testing.assert_array_equal(a["labels"], b["labels"])
        key = jax.random.key(k)
        same = np.asarray(draw(a, key)), np.asarray(draw(b, key))
        np.testing.assert_allclose(*same, rtol=2e-3, atol=2e-3)
        drawn["online"].append(same[0])
        drawn["cached"].append(np.asarray(draw(b, jax.random.fold_in(key, 1))))
        variance.append(np.square(np.asarray(a["std"]) * SCALE).mean())
    online, cached = (np.concatenate(parts) for parts in drawn.values())
    assert len(online) == 1120 and not np.allclose(online, cached, atol=0.1)
    # The difference of the means of n pairs of draws from the same posteriors.
    noise = np.sqrt(2 * np.mean(variance) / online.size)
    assert abs(online.mean() - cached.mean()) < 4 * noise
    assert abs(online.std() - cached.std()) < 4 * noise
    assert online.std() == pytest.approx(1, abs=0.1)


def encode_here(*arguments, expect=0):
    return run_here(encode.main, *arguments, expect=expect)


def test_a_cache_tells_its_precision(place):
    """Another one is a warning for training, and another cache for encoding."""
    assert latents.load(place / "cache").manifest["precision"] == "highest"
    flags = [*arguments(place), f"--out={place / 'cache'}", "--config.train.precision=default"]
    said = encode_here(*flags, "--verify")
    assert "cache was made with train.precision highest, not default" in said
    assert "its precision is highest, not default" in encode_here(*flags, SHARDS, expect=2)
    assert "warning" not in encode_here(*arguments(place), *flags[-2:-1], "--verify")


def test_verify(place, tmp_path):
    def verify(folder, *more, expect=0):
        options = [*arguments(place), f"--out={folder}", "--verify", *more]
        return encode_here(*options, expect=expect).splitlines()[-1]

    said = verify(place / "cache")
    assert f"is sound: {IMAGES} images in 13 shards; latents have a deviation of" in said
    assert "was made with vae.path" in verify(
        place / "cache", f"--config.vae.path={place / 'other'}", expect=2
    )
    copy = shutil.copytree(place / "cache", tmp_path / "cache")
    shard = copy / "latents-00002-of-00013.array_record"
    spoilt = bytearray(shard.read_bytes())
    spoilt[1000] ^= 1
    shard.write_bytes(spoilt)
    said = verify(copy, expect=2)
    assert "00002-of-00013.array_record is damaged: delete it and run the same" in said
    shard.unlink()
    encode_here(*arguments(place), f"--out={copy}", SHARDS)
    assert content(copy) == content(place / "cache")
    # A scale that is far from one over the deviation.
    said = verify(copy, "--config.vae.scale=0.18215", expect=2)
    assert "which should be about 1; measure vae.scale with --estimate_scale" in said
    assert "is sound" in verify(copy, f"--config.vae.scale={1.1 * SCALE}")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "scale": 0.18215}))
    assert "manifest.json is damaged, or was edited: encode anew" in verify(copy, expect=2)
    said = verify(copy, "--estimate_scale", expect=2)
    assert "--estimate_scale: not allowed with argument --verify" in said


def test_estimate_scale(place):
    printed = encode_here(*arguments(place), "--estimate_scale")
    scale = float(printed.partition("vae.scale: ")[2].split(",")[0])
    std = latents.load(place / "cache").manifest["latent_std"]
    assert scale == pytest.approx(1 / std, rel=1e-3)


def test_damaged_images_are_left_out_up_to_a_limit(place, tmp_path):
    pictures = shutil.copytree(place / "pictures", tmp_path / "pictures")
    for name in ("10/005.jpg", "2/000.jpg"):
        (pictures / name).write_bytes((pictures / name).read_bytes()[:300])
    argv = [*arguments(place), f"--config.data.path={pictures}", f"--out={tmp_path / 'cache'}"]
    *said, last = encode_here(*argv, SHARDS, expect=2).splitlines()
    assert any("pictures/10/005.jpg is left out: " in line for line in said)
    assert last.startswith("error: images that cannot be read: 1, the last")
    assert last.endswith("data.max_damaged is 0")
    # More of them are forgiven: it goes on.
    printed = encode_here(*argv, SHARDS, "--config.data.max_damaged=2")
    assert "50 images in 13 shards, 2 damaged left out" in printed
    cache = latents.load(tmp_path / "cache")
    whole = latents.load(place / "cache").take(np.arange(IMAGES), np.ones(IMAGES))
    kept = np.array([n for n in range(IMAGES) if n not in damaged_items(cache)])
    assert len(kept) == len(cache) == 50
    found = cache.take(np.arange(50), np.ones(50))
    np.testing.assert_array_equal(found["mean"], whole["mean"][kept])


def damaged_items(cache):
    return {item for shard in cache.manifest["shards"] for item in shard["damaged"]}


BAD_ENCODING = {
    "no out": ([], "--out is missing"),
    "no VAE": (["--out=OUT", "--config.vae.path=nothing"], "nothing"),
    "pixels": (["--out=OUT", "--config.vae.path=identity"], "nothing to encode with"),
    "random": (["--out=OUT", "--config.data.crop=random"], "a cache needs data.crop=center"),
    "latents": (["--out=OUT", "--config.data.name=latents"], "tfds and parquet can be encoded"),
    "digits": (
        ["--out=OUT", "--config.data.name=digits", "--config.data.path="],
        "tfds and parquet can be encoded",
    ),
    "no images": (["--out=OUT", "--config.data.path=EMPTY"], "holds no images"),
    "classes": (["--out=OUT", "--config.model.num_classes=4"], "has 3 classes, but"),
    "shards": (["--out=OUT", "--shard_images=0"], "must be at least 1"),
    "part": (["--out=OUT", "--part=5/4"], "--part=5/4: expected K/N, e.g. 2/4"),
    "not finished": (["--out=EMPTY", "--verify"], "holds no manifest.json"),
    "another VAE": (
        ["--out=CACHE", SHARDS, "--config.vae.path=OTHER"],
        "holds another cache: its vae",
    ),
    "other shards": (["--out=CACHE"], "its shard_images is 4, not 2048"),
    "out is a file": (["--out=CACHE/manifest.json"], "is a file, not a folder"),
}


def places(text, place, tmp_path):
    (tmp_path / "empty").mkdir(exist_ok=True)
    for name, path in (
        ("OUT", tmp_path / "out"), ("EMPTY", tmp_path / "empty"), ("CACHE", place / "cache"),
        ("OTHER", place / "other"), ("RENAMED", place / "renamed"),
    ):  # fmt: skip
        text = text.replace(name, str(path))
    return text


@pytest.mark.parametrize("name", BAD_ENCODING)
def test_bad_encoding(name, place, tmp_path, capsys, monkeypatch, in_root):
    more, message = BAD_ENCODING[name]
    before = content(place / "cache")
    argv = [*arguments(place), *(places(text, place, tmp_path) for text in more)]
    assert message in exits_with_one_line(encode.main, argv, capsys, monkeypatch)
    assert not (tmp_path / "out").exists() and content(place / "cache") == before


BAD_TRAINING = {
    "another VAE": (["--config.vae.path=OTHER"], "was made with vae.path"),
    "another VAE by name": (
        ["--config.vae.path=OTHER", "--config.train.sample_every=0",
         "--config.sample.num_samples=0"],
        "was made with vae.path",
    ),
    "another size": (["--config.data.image_size=64"], "with data.image_size 32, not 64"),
    "classes": (["--config.model.num_classes=4"], "has 3 classes"),
    "no cache": (["--config.data.path=EMPTY"], "holds no manifest.json"),
    "pixels": (["--config.vae.path=identity"], "data.name=latents requires vae.path"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training(name, place, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    more, message = BAD_TRAINING[name]
    argv = [*arguments(place, "latents", "cache"), f"--workdir={tmp_path / 'out'}"]
    argv += [places(text, place, tmp_path) for text in more]
    assert message in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_another_scale_takes_the_same_cache(place, tmp_path):
    """Latents are multiplied when they are read; a scale that leaves them far from 1 is told."""
    argv = [*arguments(place), f"--out={place / 'cache'}", SHARDS, "--config.vae.scale=0.5"]
    before = content(place / "cache")
    assert "finished already" in encode_here(*argv) and content(place / "cache") == before
    for scale, told in ((0.5, True), (1.1, False)):
        printed = train_here(
            *arguments(place, "latents", "cache"), f"--config.vae.scale={scale}", *ONE_STEP,
            f"--workdir={tmp_path / str(scale)}",
        )  # fmt: skip
        assert ("warning: " in printed) == told
        assert ("times vae.scale 0.5 is 0." in printed) == told


# What a VAE's folder says → the scale that a config must have, or what is said against it.
FOLDERS = {
    "nothing": ({"norm_num_groups": 4}, "any"),
    "scale": ({"scaling_factor": 0.13025}, 0.13025),
    "neutral": ({"scaling_factor": 1, "shift_factor": None, "latents_mean": [0, 0, 0, 0],
                 "latents_std": [1.0] * 4}, 1),
    "few means": ({"latents_mean": [0, 0, 0.5]},
                  "latents_mean is [0, 0, 0.5]; it must be a number, or 4 in a list"),
    "deviation": ({"latents_std": [1, 1, 1, 0]}, "latents_std is [1, 1, 1, 0]; it must be a posit"),
    "words": ({"scaling_factor": "0.2"}, "scaling_factor is 0.2; it must be a positive number"),
    "huge": ({"shift_factor": 10**400}, "it must be a number"),
    "nan": ({"scaling_factor": float("nan")}, "scaling_factor is nan; it must be a positive"),
    "object": ({"latents_mean": {"a": 1}}, "latents_mean is {'a': 1}; it must be a number, or 4"),
    "list": ([1], "config.json is damaged, or was edited: expected a JSON object"),
    "damaged": ("{", "config.json cannot be read: "),
    "groups": ({"norm_num_groups": "4"}, "norm_num_groups in its config.json is '4'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_the_scale_that_a_vaes_folder_says(name, place, tmp_path, monkeypatch):
    told, expected = FOLDERS[name]
    folder = tmp_path / "vae"
    folder.mkdir()
    write_vae(folder / f"{DIFFUSERS}.safetensors")
    if isinstance(told, dict):
        told = {"norm_num_groups": 4, **told}
    (folder / "config.json").write_text(told if isinstance(told, str) else json.dumps(told))
    argv = [*arguments(place), f"--config.vae.path={folder}"]
    run = [*argv, *ONE_STEP, f"--workdir={tmp_path / 'run'}"]
    encoding = [*argv, f"--out={tmp_path / 'cache'}"]
    if expected == "any":
        assert recorded_norm(folder).get("scale") is None
        return
    said = expected
    if not isinstance(expected, str):
        said = f"is {float(expected)}: set vae.scale to it, or to train with your own take "
    for printed in (train_here(*run, expect=2), encode_here(*encoding, expect=2)):
        assert printed.startswith("error: ") and printed.count("\n") == 1 and said in printed
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    if name == "scale":
        train_here(*run, f"--config.vae.scale={float(expected)}")
        assert "vae.scale: " in encode_here(*argv, "--estimate_scale")


def test_half_a_cache_is_no_cache(place, tmp_path):
    half = shutil.copytree(place / "cache", tmp_path / "half")
    (half / "manifest.json").rename(half / "unfinished.json")
    printed = train_here(
        *arguments(place, "latents", "cache"), f"--config.data.path={half}",
        f"--workdir={tmp_path / 'run'}", expect=2,
    )  # fmt: skip
    assert "half is not finished: run the same mdt_jax.encode again" in printed
    assert not (tmp_path / "run").exists()
