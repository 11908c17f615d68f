"""Encoding in processes of its own: killed, stopped, on several hosts, on a full disk."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mdt_jax import encode
from mdt_jax.data import latents
from mdt_jax.runtime import locks
from tests.conftest import ROOT, run_command, run_here, start_command
from tests.encoding import IMAGES, SHARDS, arguments, content, make_place
from tests.processes.hosts import feed
from tests.processes.together import all_well, ends, start_as_one, start_hosts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("encode"))


def test_killed_three_times_it_ends_with_the_same_bytes(place, tmp_path):
    chance = random.Random(0)
    command = ["mdt_jax.encode", *arguments(place), f"--out={tmp_path / 'cache'}", SHARDS]
    killed = 0
    while killed < 3:
        before = len(list(tmp_path.glob("cache/*.array_record")))
        process = start_command(*command)
        deadline = time.monotonic() + 120
        # Somewhere in the work on one of the next shards.
        wanted = min(before + chance.randint(0, 2), 9)
        while len(list(tmp_path.glob("cache/*.array_record"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.communicate()
        assert not (tmp_path / "cache" / "manifest.json").exists()
        killed += 1
    assert 0 < len(list(tmp_path.glob("cache/*.array_record"))) < 13
    printed = run_command(*command)
    assert "52 images in 13 shards, 0 damaged" in printed
    assert content(tmp_path / "cache") == content(place / "cache")
    assert "is finished already" in run_command(*command)


def test_ctrl_c_reaches_the_workers_too(place, tmp_path):
    out = tmp_path / "cache"
    command = [sys.executable, "-m", "mdt_jax.encode", *arguments(place), "--shard_images=1"]
    slow = "--config.data.image_size=256"  # so that it is not done before the signal comes
    process = subprocess.Popen(
        [*command, f"--out={out}", "--config.data.workers=1", slow],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not list(tmp_path.glob("cache/*.array_record")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130 and printed.endswith("\nstopped\n")
    assert "Traceback" not in printed and not (out / "manifest.json").exists()
    assert not list(out.glob("*.tmp"))


def test_on_eight_devices(place, tmp_path):
    out = tmp_path / "cache"
    flags = "--xla_force_host_platform_device_count=8"
    run_command("mdt_jax.encode", *arguments(place), f"--out={out}", XLA_FLAGS=flags)
    assert len(list(out.glob("*.array_record"))) == 1
    items = np.arange(IMAGES), np.ones(IMAGES)
    found, one = latents.load(out).take(*items), latents.load(place / "cache").take(*items)
    np.testing.assert_array_equal(found["labels"], one["labels"])
    for name in ("mean", "std"):
        np.testing.assert_allclose(found[name], one[name], rtol=2e-3, atol=2e-3)


def test_two_hosts_share_the_work(place, tmp_path):
    out = f"--out={tmp_path / 'cache'}"
    all_well(start_as_one(2, "mdt_jax.encode", *arguments(place), out, SHARDS))
    assert content(tmp_path / "cache") == content(place / "cache")
    verified = all_well(start_as_one(2, "mdt_jax.encode", *arguments(place), out, "--verify"))
    assert "is sound: 52 images in 13 shards" in verified


def test_a_host_that_fails_tells_the_others(place, tmp_path):
    """Its part is in use by another command; the other host does not go on alone."""
    out = tmp_path / "cache"
    with locks.held(out / ".part-2-of-2.lock", "the test"):
        flags = [*arguments(place), f"--out={out}", "--shard_images=1"]
        first, second = ends(start_as_one(2, "mdt_jax.encode", *flags))
    assert (first[0], second[0]) == (2, 2)
    assert f"part 2 of 2 of {out} is in use by process" in second[1]
    assert "process 1 stopped: part 2 of 2" in first[1], first[1]
    assert not (out / "manifest.json").exists()


def test_parts_on_machines_that_know_nothing_of_each_other(place, tmp_path):
    parts = [
        start_command(
            "mdt_jax.encode",
            *arguments(place),
            f"--out={tmp_path / 'cache'}",
            SHARDS,
            f"--part={part}",
        )
        for part in ("1/3", "2/3", "3/3")
    ]
    all_well(parts)
    assert content(tmp_path / "cache") == content(place / "cache")
    again = run_here(
        encode.main, *arguments(place), f"--out={tmp_path / 'new'}", SHARDS, "--part=2/3"
    )
    assert "this part is done; the last of the 3 to end finishes the cache" in again
    assert len(list((tmp_path / "new").glob("*.array_record"))) == 4


def test_hosts_read_their_parts_of_the_same_batches(place, tmp_path, in_root, monkeypatch):
    monkeypatch.setattr("sys.argv", sys.argv)  # put back after what `feed` does to it
    names = arguments(place, "latents", "cache")
    for count in (1, 2, 4):
        (tmp_path / str(count)).mkdir()
        given = str(tmp_path / str(count)), "3", *names
        if count == 1:
            feed(*given)
        else:
            all_well(start_hosts(count, "feed", *given))
    for k in range(3):
        for name in ("mean", "std", "labels"):
            whole = np.load(tmp_path / "1" / f"{k}-{name}-0.npy")
            for count in (2, 4):
                starts = range(0, 16, 16 // count)
                parts = [np.load(tmp_path / str(count) / f"{k}-{name}-{n}.npy") for n in starts]
                np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_disk_is_full(place, tmp_path):
    """What was finished stays, and the same command ends with the same bytes."""
    out = tmp_path / "cache"
    command = [sys.executable, "-m", "mdt_jax.encode", *arguments(place), f"--out={out}"]
    limited = ["bash", "-c", 'ulimit -f 100 && exec "$@"', "bash", *command]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "could not be written: write() failed: File too large" in last
    assert "finished shards are kept, and the same command resumes" in last
    assert [path.name for path in out.iterdir()] == ["unfinished.json"]
