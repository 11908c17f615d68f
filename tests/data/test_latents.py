"""The latent cache on disk: written in shards, read at random, and every way it can be broken."""

import errno
import json
import os
import pickle

import numpy as np
import pytest

from mdt_jax.data import latents, latents_writer, pipeline
from mdt_jax.data.protocols import Status
from mdt_jax.runtime.errors import UserError

SHAPE = (4, 4, 4)


def batches(items, damaged=()):
    """Made-up moments that tell which image and which part they are of."""
    for start in range(0, len(items), 4):
        part = items[start : start + 4]
        parts = np.arange(4)[None, :, None, None, None]
        yield {
            "moments": np.broadcast_to(
                part[:, None, None, None, None] + parts / 4, (len(part), 4, *SHAPE)
            ).astype(np.float16),
            "labels": (part % 3).astype(np.int32),
            "items": part,
            "status": np.where(np.isin(part, damaged), Status.REPLACED, Status.READ),
        }


def make(folder, images=20, shard_images=8, damaged=(), shards=None):
    what = {
        "format": 1, "images": images, "shard_images": shard_images, "latents": list(SHAPE),
        "classes": ["a", "b", "c"], "image_size": 32, "vae": {"path": "v"}, "scale": 1.0,
    }  # fmt: skip
    making = latents_writer.CacheWriter(folder, what)
    making.start()
    for shard in range(making.num_shards) if shards is None else shards:
        making.write(shard, batches(making.items(shard), damaged))
    return making


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"caf\xe9")], ids=ascii)
def test_folders_that_cannot_be_read_back(name, tmp_path):
    with pytest.raises(UserError, match="in its path, and a cache of latents there cannot be"):
        make(tmp_path / name)
    with pytest.raises(UserError, match="choose another name"):
        latents.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_there_and_back(tmp_path):
    making = make(tmp_path / "c", damaged=(3, 19))
    manifest = making.finish()
    assert [shard["records"] for shard in manifest["shards"]] == [7, 8, 3]
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == [*(shard["file"] for shard in manifest["shards"]), "manifest.json"]
    kept = [n for n in range(20) if n not in (3, 19)]
    cache = latents.load(tmp_path / "c")
    assert len(cache) == 18 and cache.classes == ["a", "b", "c"]
    items = np.random.default_rng(0).permutation(18)
    for source in (cache, pickle.loads(pickle.dumps(cache))):
        found = source.take(items, np.zeros(18))
        expected = np.array(kept)[items]
        assert found["mean"].shape == (18, *SHAPE) and found["mean"].dtype == np.float16
        np.testing.assert_array_equal(found["mean"][:, 1, 2, 3], expected)
        np.testing.assert_array_equal(found["std"][:, 1, 2, 3], expected + 0.25)
        np.testing.assert_array_equal(found["labels"], expected % 3)
        assert found["labels"].dtype == np.int32 and (found["status"] == Status.READ).all()
    u = np.arange(18) / 18
    mirrored = latents.load(tmp_path / "c", flip=True).take(items, u)
    expected = np.array(kept)[items] + np.where(u < 0.5, 0.5, 0)
    np.testing.assert_array_equal(mirrored["mean"][:, 0, 0, 0], expected)
    np.testing.assert_array_equal(mirrored["std"][:, 0, 0, 0], expected + 0.25)
    assert cache.name(0).endswith("record 0 of " + str(tmp_path / "c" / names[0]))
    assert cache.name(7).endswith("record 0 of " + str(tmp_path / "c" / names[1]))


def test_the_deviation_is_that_of_draws(tmp_path):
    manifest = make(tmp_path / "c").finish()
    random = np.random.default_rng(0)
    draws = [
        n + view + random.normal(size=(2000,)) * (n + view + 0.25)
        for n in range(20)
        for view in (0, 0.5)
    ]
    assert manifest["latent_std"] == pytest.approx(np.std(draws), rel=0.02)


def test_a_shard_stands_or_is_made_again(tmp_path):
    making = make(tmp_path / "c", shards=[0, 2])
    assert [making.done(n) is not None for n in range(3)] == [True, False, True]
    assert making.finish() is None and not making.start()
    with pytest.raises(UserError, match="is not finished: run the same mdt_jax.encode again"):
        latents.load(tmp_path / "c")

    def breaks():
        yield from batches(making.items(1)[:4])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        making.write(1, breaks())
    assert not list((tmp_path / "c").glob("*00001*"))
    making.write(1, batches(making.items(1)))
    manifest = making.finish()
    # One that is lost or cut short later is found when the cache is opened, and made again.
    lost = tmp_path / "c" / manifest["shards"][1]["file"]
    before = lost.read_bytes()
    lost.write_bytes(before[:-100])
    with pytest.raises(UserError, match="00001-of-00003.*missing or cut short"):
        latents.load(tmp_path / "c")
    assert not making.start()
    assert [making.done(n) is not None for n in range(3)] == [True, False, True]
    making.write(1, batches(making.items(1)))
    assert making.finish() == manifest and lost.read_bytes() == before
    assert making.start()


def test_flipped_bytes_are_found(tmp_path):
    make(tmp_path / "c").finish()
    cache = latents.load(tmp_path / "c")
    total = sum((latents.check_shard(cache, n) for n in range(3)), latents.Sums())
    assert total.deviation() == cache.manifest["latent_std"]
    shard = tmp_path / "c" / cache.manifest["shards"][1]["file"]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 :] = b"x" * (len(content) - len(content) // 2)
    shard.write_bytes(content)
    cache = latents.load(tmp_path / "c")  # as long as it was
    with pytest.raises(UserError, match="00001-of-00003.array_record is damaged: delete it"):
        latents.check_shard(cache, 1)
    with pytest.raises(UserError, match="record . of .*00001-of-00003.* cannot be read: .*verify"):
        list(pipeline.batches(cache, [(np.arange(20), np.ones(20))]))


def test_records_of_another_cache_are_not_trained_on(tmp_path):
    """Shards, or one record in a shard, of the same length: told by what they hold."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    manifest = make(tmp_path / "c", images=24).finish()
    paths = [tmp_path / "c" / shard["file"] for shard in manifest["shards"]]
    whole = [path.read_bytes() for path in paths]
    assert len({len(content) for content in whole}) == 1 and len(set(whole)) == 3

    def damaged():
        status = latents.load(tmp_path / "c").take(np.arange(24), np.ones(24))["status"]
        return np.flatnonzero(status == Status.UNREADABLE).tolist()

    assert damaged() == []
    paths[0].write_bytes(whole[1])
    paths[1].write_bytes(whole[0])
    assert damaged() == [*range(16)]
    with pytest.raises(UserError, match="record . of .* cannot be read: it is damaged or of anoth"):
        list(pipeline.batches(latents.load(tmp_path / "c"), [(np.arange(24), np.ones(24))]))
    records = ArrayRecordReader(str(paths[2])).read_all()
    paths[0].write_bytes(whole[0])
    paths[1].write_bytes(whole[1])
    writer = ArrayRecordWriter(str(paths[2]), latents_writer.OPTIONS)
    for n, record in enumerate(records):
        writer.write(records[0] if n == 5 else record)
    writer.close()
    assert damaged() == [21]
    # Caches from before records had checksums are read as they were.
    for shard in manifest["shards"]:
        del shard["crc32"]
    manifest["checksum"] = latents.checksum(manifest)
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    assert damaged() == []


def test_other_folders(tmp_path):
    with pytest.raises(UserError, match="holds no manifest.json: python -m mdt_jax.encode"):
        latents.load(tmp_path)
    make(tmp_path / "c")
    with pytest.raises(UserError, match="holds another cache: its images is 20, not 21"):
        make(tmp_path / "c", images=21)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="is neither empty nor a cache"):
        make(tmp_path / "full")
    making = make(tmp_path / "d")
    making.finish()
    manifest = tmp_path / "d" / "manifest.json"
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        latents.load(tmp_path / "d")
    manifest.unlink()
    whole = make(tmp_path / "e").finish()
    outside = {**whole["shards"][0], "file": "../d/latents-00000-of-00003.array_record"}
    for content in ([], {"images": 3}, {**whole, "shards": 3}, {**whole, "shards": [outside]}):
        (tmp_path / "e" / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="manifest.json is damaged, or was edited"):
            latents.load(tmp_path / "e")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "7", '{"a": 1}', "\udcff", ""])
def test_a_manifest_of_another_form(content, tmp_path):
    making = make(tmp_path / "c")
    making.finish()
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_bytes(content.encode(errors="surrogateescape"))
    for call in (making.start, lambda: latents.load(tmp_path / "c")):
        with pytest.raises(UserError, match=r"c/manifest\.json (is damaged|cannot be read)"):
            call()


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", "7", "\udcff", ""])
def test_notes_of_another_form(content, tmp_path):
    """A shard whose note is damaged is made again; what the cache is of cannot be guessed."""
    making = make(tmp_path / "c")
    notes = sorted((tmp_path / "c").glob("*.array_record.json"))
    whole = notes[1].read_text()
    bad = [content.encode(errors="surrogateescape"), whole.replace('"records": 8', '"records": 9')]
    for each in bad:
        notes[1].write_bytes(each if isinstance(each, bytes) else each.encode())
        assert [making.done(n) is not None for n in range(3)] == [True, False, True]
        assert making.finish() is None
    making.write(1, batches(making.items(1)))
    assert notes[1].read_text() == whole
    (tmp_path / "c" / "unfinished.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"unfinished\.json|holds another cache"):
        making.start()


def test_a_cache_that_cannot_be_looked_at_just_now_is_not_lost(tmp_path, monkeypatch):
    making = make(tmp_path / "c")
    making.finish()
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}

    def stat(path, *_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        for call in (making.start, lambda: latents.load(tmp_path / "c")):
            with pytest.raises((OSError, UserError), match="Input/output error"):
                call()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
