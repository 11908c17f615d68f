"""Encoding to a bucket in processes of its own: killed, two at once, over bad connections."""

import random
import time

import pytest

from mdt_jax import encode
from tests.conftest import run_command, run_here, start_command
from tests.encoding import SHARDS, arguments, content, make_place
from tests.processes.together import all_well, ends, start_hosts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("encode"))


def objects(gcs) -> dict[str, bytes]:
    """Name and content of each object in the cache."""
    return {name.removeprefix("cache/"): gcs.read(name) for name in gcs.objects("cache/")}


def test_killed_while_it_uploads_it_ends_with_the_same_bytes(gcs, place):
    chance, whole = random.Random(0), content(place / "cache")
    command = ["mdt_jax.encode", *arguments(place), f"--out={gcs.root}/cache", SHARDS]
    for killed in range(6):
        # The upload that is under way when the process is killed takes half a second.
        gcs.set_faults(dict(method="POST", target="array_record", wait=0.5, skip=killed % 3))
        process = start_command(*command)
        deadline = time.monotonic() + 120
        while not any("array_record" in r for r in gcs.requests if r.startswith("POST")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(chance.random() * 1.5)
        assert process.poll() is None
        process.kill()
        process.communicate()
        found = objects(gcs)
        assert "manifest.json" not in found
        for name, written in found.items():
            if name.endswith(".array_record"):
                assert written == whole[name]
    shards = [name for name in found if name.endswith(".array_record")]
    assert 0 < len(shards) < 13
    gcs.set_faults()
    before = {name: gcs.generation(f"cache/{name}") for name in shards}
    done = [name for name in shards if f"{name}.json" in found]
    assert done
    printed = run_command(*command)
    assert "52 images in 13 shards, 0 damaged" in printed
    assert objects(gcs) == whole
    for name in done:  # they were not written again
        assert gcs.generation(f"cache/{name}") == before[name]
    assert "is finished already" in run_command(*command)
    verified = run_here(encode.main, *arguments(place), f"--out={gcs.root}/cache", "--verify")
    assert "is sound: 52 images in 13 shards" in verified


def test_an_upload_that_is_cut_in_the_middle(gcs, place):
    command = ["mdt_jax.encode", *arguments(place), f"--out={gcs.root}/cache", SHARDS]
    gcs.set_faults(
        dict(method="POST", target="00003-of", cut="up", times=1),
        dict(method="POST", target="00005-of", cut="answer", times=2),
        dict(target="cache/", status=503, times=4, skip=20),
    )
    assert "52 images in 13 shards, 0 damaged" in run_command(*command)
    assert [each.times for each in gcs.faults] == [0, 0, 0]
    assert objects(gcs) == content(place / "cache")


def test_a_bucket_that_takes_no_more_ends_in_a_line(gcs, place):
    command = ["mdt_jax.encode", *arguments(place), f"--out={gcs.root}/cache", SHARDS]
    gcs.set_faults(dict(method="POST", target="00003-of", status=403))
    printed = run_command(*command, expect=2)
    assert "Traceback" not in printed
    line = printed.strip().splitlines()[-1]
    assert line.startswith(f"error: {gcs.root}/cache/latents-00003-of-00013.array_record could not")
    assert line.endswith("finished shards are kept, and the same command resumes")
    names = set(gcs.objects("cache/"))
    assert len([name for name in names if name.endswith(".array_record")]) == 3
    assert not [name for name in names if ".part-" in name]
    gcs.set_faults()
    run_command(*command)
    assert objects(gcs) == content(place / "cache")


def test_parts_on_machines_that_know_nothing_of_each_other(gcs, place):
    command = ["mdt_jax.encode", *arguments(place), f"--out={gcs.root}/cache", SHARDS]
    all_well([start_command(*command, f"--part={part}") for part in ("1/2", "2/2")])
    assert objects(gcs) == content(place / "cache")
    verify = ["mdt_jax.encode", *arguments(place), f"--out={gcs.root}/cache", "--verify"]
    assert "is sound" in all_well([start_command(*verify) for _ in range(2)])


def test_two_hosts_share_the_work(gcs, place):
    all_well(start_hosts(2, "encode", *arguments(place), f"--out={gcs.root}/cache", SHARDS))
    assert objects(gcs) == content(place / "cache")


def test_two_with_the_same_part(gcs, place):
    """One of them encodes, and the other ends in a line or finds the cache finished."""
    command = ["mdt_jax.encode", *arguments(place), f"--out={gcs.root}/cache", SHARDS]
    gcs.set_faults(dict(method="POST", target="array_record", wait=3, times=3))
    ended = sorted(ends([start_command(*command) for _ in range(2)]))
    assert ended[0][0] == 0, ended
    assert (ended[1][0] == 2 and "is in use by process" in ended[1][1]) or (
        ended[1][0] == 0 and "is finished already" in ended[0][1] + ended[1][1]
    ), ended
    assert objects(gcs) == content(place / "cache")
