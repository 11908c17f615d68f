"""Latent caches in buckets: written whole, read in place, and what a bucket can do to them."""

import pickle

import numpy as np
import pytest

from mdt_jax.data import latents, pipeline
from mdt_jax.data.protocols import Status
from mdt_jax.runtime import files, leases
from mdt_jax.runtime.errors import UserError
from tests.data.test_latents import batches, make


@pytest.fixture
def cache(gcs, tmp_path):
    """(the folder of a finished cache in the bucket, the same cache on the disk)."""
    folder = files.as_path(f"{gcs.root}/latents/c")
    make(tmp_path / "c").finish()
    make(folder).finish()
    return folder, tmp_path / "c"


def test_it_has_the_bytes_of_a_cache_on_a_disk(gcs, cache):
    objects = {name.removeprefix("latents/c/"): gcs.read(name) for name in gcs.objects()}
    assert objects == {path.name: path.read_bytes() for path in cache[1].iterdir()}


def test_it_is_read_in_place(cache, monkeypatch):
    monkeypatch.setattr(files, "fetched", None)  # nothing is copied
    items, u = np.random.default_rng(0).permutation(20), np.random.default_rng(1).random(20)
    here, there = latents.load(cache[1], flip=True), latents.load(cache[0], flip=True)
    expected = here.take(items, u)
    for source in (there, pickle.loads(pickle.dumps(there))):
        found = source.take(items, u)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    assert there.manifest == here.manifest
    assert there.name(8).startswith(f"record 0 of {cache[0]}/latents-00001")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_disk(cache, workers):
    plan = pipeline.Shuffled(20, 0, 8, np.arange(8))
    here, there = (
        pipeline.batches(latents.load(folder), plan, workers=workers) for folder in reversed(cache)
    )
    for _ in range(6):
        one, other = next(here), next(there)
        assert one.keys() == other.keys()
        for name, values in one.items():
            np.testing.assert_array_equal(other[name], values)
    here.close()
    there.close()


@pytest.mark.parametrize(
    "fields", [{"status": 503}, {"status": 429}, {"cut": "down"}, {"wait": 0.5}], ids=str
)
def test_a_fault_that_passes_is_not_seen(gcs, cache, fields):
    gcs.set_faults(dict(**fields, target="array_record", times=2))
    found = latents.load(cache[0]).take(np.arange(20), np.ones(20))
    assert (found["status"] == Status.READ).all()
    assert [each.times for each in gcs.faults] == [0]


def test_what_cannot_be_read_now_is_not_damaged(gcs, cache):
    source = latents.load(cache[0])
    gcs.set_faults(dict(status=403, target="00001-of-00003"))
    with pytest.raises(OSError, match="reading gs://.*00001-of-00003"):
        source.take(np.arange(20), np.ones(20))
    with pytest.raises(UserError, match="the data cannot be read: .*gs://.*00001-of-00003"):
        list(pipeline.batches(source, [(np.arange(20), np.ones(20))]))
    gcs.set_faults()
    found = latents.load(cache[0]).take(np.arange(20), np.ones(20))
    assert (found["status"] == Status.READ).all()


def test_damage_is_found(gcs, cache):
    name = "latents/c/latents-00001-of-00003.array_record"
    content = bytearray(gcs.read(name))
    content[len(content) // 2 :] = b"x" * (len(content) - len(content) // 2)
    gcs.write(name, bytes(content))
    source = latents.load(cache[0])
    total = latents.check_shard(source, 0) + latents.check_shard(source, 2)
    assert total.records == 12
    with pytest.raises(UserError, match="gs://.*00001-of-00003.array_record is damaged: delete it"):
        latents.check_shard(source, 1)
    with pytest.raises(UserError, match="record . of gs://.*00001-of-00003.* cannot be read"):
        list(pipeline.batches(source, [(np.arange(20), np.ones(20))]))


def test_a_shard_stands_or_is_made_again(gcs, cache):
    folder, names = cache[0], gcs.objects()
    gcs.write(names[1], gcs.read(names[1])[:-100])
    gcs.remove(names[2])
    with pytest.raises(UserError, match="00001-of-00003.*and 1 other shards are missing or cut"):
        latents.load(folder)
    whole = {path.name: path.read_bytes() for path in cache[1].iterdir()}
    making = make(folder, shards=[])
    assert [making.done(n) is not None for n in range(3)] == [True, False, False]
    assert making.finish() is None
    with pytest.raises(UserError, match="is not finished: run the same mdt_jax.encode again"):
        latents.load(folder)
    for shard in (1, 2):
        making.write(shard, batches(making.items(shard)))
    making.finish()
    assert making.start()
    assert [gcs.read(name) for name in names[:3]] == [whole[name[10:]] for name in names[:3]]
    assert gcs.objects() == names


def test_nothing_half_written_has_a_final_name(gcs, cache):
    making = make(files.as_path(f"{gcs.root}/other"), shards=[0])

    def breaks():
        yield from batches(making.items(1)[:4])
        raise KeyboardInterrupt

    before = gcs.objects("other/")
    with pytest.raises(KeyboardInterrupt):
        making.write(1, breaks())
    assert gcs.objects("other/") == before
    gcs.set_faults(dict(status=403, method="POST", target="00001-of-00003"))
    with pytest.raises(
        UserError, match="00001-of-00003.* could not be written: Forbidden.*resumes"
    ):
        making.write(1, batches(making.items(1)))
    assert gcs.objects("other/") == before
    gcs.set_faults(dict(status=503, method="POST", times=1))
    making.write(1, batches(making.items(1)))
    gcs.set_faults(dict(cut="up", method="POST", times=1))
    making.write(2, batches(making.items(2)))
    making.finish()
    assert {n[6:]: gcs.read(n) for n in gcs.objects("other/")} == {
        path.name: path.read_bytes() for path in cache[1].iterdir()
    }


def test_one_process_writes_a_part(gcs, monkeypatch):
    monkeypatch.setattr(leases, "WATCH", 1.0)
    monkeypatch.setattr(leases, "BEAT", 0.2)
    making = make(files.as_path(f"{gcs.root}/c"), shards=[])
    with making.lock((0, 2)) as check:
        check()
        for part, message in (((0, 2), "part 1 of 2 of gs://.*"), ((0, 3), "gs://.*/c")):
            with (
                pytest.raises(UserError, match=f"{message} is in use by process"),
                making.lock(part),
            ):
                pass
        with making.lock((1, 2)):
            assert gcs.objects("c/.part") == ["c/.part-1-of-2.lock", "c/.part-2-of-2.lock"]
    assert gcs.objects() == ["c/unfinished.json"]


def test_other_folders(gcs):
    with pytest.raises(UserError, match="holds no manifest.json: python -m mdt_jax.encode"):
        latents.load(f"{gcs.root}/nothing")
    gcs.write("full/thesis.txt", b"")
    gcs.write("file", b"")
    with pytest.raises(UserError, match="full is neither empty nor a cache"):
        make(files.as_path(f"{gcs.root}/full"))
    with pytest.raises(UserError, match="file is a file, not a folder for latents"):
        make(files.as_path(f"{gcs.root}/file"))
    # What another process leaves for a moment is no other content.
    gcs.write("c/.write-test", b"")
    gcs.write("c/.part-1-of-2.lock.12ab", b"")
    make(files.as_path(f"{gcs.root}/c"))
