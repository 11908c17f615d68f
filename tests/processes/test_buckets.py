"""Runs whose workdir is in a bucket: killed, stopped, refused, with faults of the network."""

import json
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.conftest import run_command, start_command
from tests.gcs_protocol import Fault
from tests.processes.test_main import assert_same_run
from tests.processes.together import all_well, free_port
from tests.runs import LONG, SAMPLE

WORKDIR = "runs/digits"
UPLOAD = "(POST|PUT) /upload/"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The long run on a disk."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    return workdir


def downloaded(gcs, folder):
    """The workdir in the bucket, as files in a folder."""
    for name in gcs.objects(f"{WORKDIR}/"):
        path = folder / name.removeprefix(f"{WORKDIR}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gcs.read(name))
    return folder


def start(gcs, *arguments: str) -> subprocess.Popen:
    return start_command("mdt_jax.main", *LONG, f"--workdir={gcs.root}/{WORKDIR}", *arguments)


def finish(gcs, *arguments: str) -> str:
    return run_command("mdt_jax.main", *LONG, f"--workdir={gcs.root}/{WORKDIR}", *arguments)


def uploads(gcs) -> int:
    return sum(re.match(UPLOAD, request) is not None for request in gcs.requests)


def await_uploads(gcs, process: subprocess.Popen, count: int) -> bool:
    """Wait until a run has begun `count` uploads; whether it still runs then."""
    until = time.time() + 200
    while uploads(gcs) < count:
        if process.poll() is not None:
            return False
        assert time.time() < until
        time.sleep(0.01)
    return True


def committed(gcs) -> list[int]:
    """The steps that Orbax calls finished."""
    pattern = re.compile(f"{WORKDIR}/checkpoints/([0-9]+)/commit_success.txt")
    return sorted(
        int(m[1]) for name in gcs.objects(f"{WORKDIR}/") if (m := pattern.fullmatch(name))
    )


def test_killed_ten_times_ends_with_the_same_bits(gcs, undisturbed, tmp_path):
    moments = [random.SystemRandom().randint(1, 90) for _ in range(10)]
    print("killed after uploads", moments)  # shown when the test fails
    partial = 0
    for moment in moments:
        gcs.set_faults()  # forgets the requests
        process = start(gcs)
        if await_uploads(gcs, process, moment):
            process.kill()
        process.communicate()
        steps = {name.split("/")[3] for name in gcs.objects(f"{WORKDIR}/checkpoints/")}
        partial += len(steps) > len(committed(gcs))
        # The log is never ahead of the last step that is whole.
        log = f"{WORKDIR}/metrics.jsonl"
        lines = gcs.read(log).splitlines() if log in gcs.objects(log) else []
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert len(lines) <= max(committed(gcs), default=0)
    print("kills that left a part of a step:", partial)
    finish(gcs)
    assert_same_run(downloaded(gcs, tmp_path / "run"), undisturbed)
    assert not [name for name in gcs.objects() if "lock" in name or "write-test" in name]


FAULTS = {
    "503 for each kind of request, twice": [
        Fault(method, target, status=503, times=2, skip=skip)
        for method, target in (
            ("POST", "/upload/"), ("GET", r"/o\?"), ("GET", "alt=media"), ("DELETE", "/o/"),
            ("POST", "manifest.ocdbt"), ("POST", "commit_success"), ("POST", "metrics.jsonl"),
        )
        for skip in (0, 3)
    ],
    "cut connections": [
        Fault("POST", "/upload/.*/d/", cut="up", times=2),
        Fault("POST", "/upload/", cut="answer", times=2, skip=5),
        Fault("GET", "alt=media", cut="down", times=2),
        Fault("POST", "metrics.jsonl", cut="up", times=1),
    ],
    "slow answers": [
        Fault("POST", "/upload/", wait=1.0, times=10, skip=4), Fault("GET", "", wait=0.5, times=10),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass_change_nothing(name, gcs, undisturbed, tmp_path):
    process = start(gcs, "--config.train.steps=60")
    out = process.communicate(timeout=200)
    assert process.returncode == 0, out
    gcs.set_faults(*FAULTS[name])
    printed = finish(gcs)
    assert "resuming from step 60" in printed and "Traceback" not in printed
    left = [fault for fault in gcs.faults if fault.times]
    assert len(left) < len(FAULTS[name]) / 2, left  # most of them struck
    gcs.set_faults()
    assert_same_run(downloaded(gcs, tmp_path / "run"), undisturbed)


def test_a_permission_that_is_withdrawn(gcs, undisturbed, tmp_path):
    gcs.set_faults(Fault("POST", "/upload/.*checkpoints/60/", status=403))
    process = start(gcs)
    printed = "".join(process.communicate(timeout=200))
    assert process.returncode == 2, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "could not be written" in errors[0] and "60" not in committed(gcs)
    assert "Traceback" not in printed
    gcs.set_faults()
    assert "resuming from step 40" in finish(gcs)
    assert_same_run(downloaded(gcs, tmp_path / "run"), undisturbed)


def test_sigterm_saves_and_a_second_writer_is_refused(gcs, undisturbed, tmp_path):
    # The run waits for the log of step 40 while the second one starts.
    gcs.set_faults(Fault("POST", "metrics.jsonl", wait=40, times=1, skip=2))
    process, until = start(gcs), time.time() + 200
    while 40 not in committed(gcs):
        assert process.poll() is None and time.time() < until
        time.sleep(0.05)
    workdir = f"{gcs.root}/{WORKDIR}"
    printed = run_command("mdt_jax.main", *LONG, f"--workdir={workdir}", expect=2)
    assert re.search(rf"error: workdir {workdir} is in use by process {process.pid} on", printed)
    process.send_signal(signal.SIGTERM)
    printed = "".join(process.communicate(timeout=100))
    assert process.returncode == 0 and "saved; the same command resumes" in printed
    assert "resuming from step" in finish(gcs)
    assert_same_run(downloaded(gcs, tmp_path / "run"), undisturbed)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes(gcs, tmp_path, count):
    address, arguments = f"127.0.0.1:{free_port()}", [*LONG, "--config.train.steps=40"]
    for workdir in (f"{gcs.root}/{WORKDIR}", tmp_path / "disk"):
        all_well([
            start_command(
                "mdt_jax.main", *arguments, f"--workdir={workdir}", f"--distributed={address}",
                f"--num_processes={count}", f"--process_id={number}",
            )
            for number in range(count)
        ])  # fmt: skip
    bucket, disk = downloaded(gcs, tmp_path / "run"), tmp_path / "disk"
    from tests.runs import arrays, lines_of

    for item in ("params", "ema", "progress"):
        for a, b in zip(arrays(bucket, item), arrays(disk, item), strict=True):
            np.testing.assert_array_equal(a, b)
    losses = [[json.loads(line)["loss"] for line in lines_of(folder)] for folder in (bucket, disk)]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def test_samples_that_were_stopped_are_not_drawn_again(gcs, tmp_path):
    flags = [*SAMPLE, "--num_samples=12", "--batch_size=2"]
    run_command("mdt_jax.sample", *flags, f"--out={tmp_path}/a.npz")
    gcs.set_faults()
    process = start_command("mdt_jax.sample", *flags, f"--out={gcs.root}/a.npz")
    assert await_uploads(gcs, process, 6)
    process.kill()
    process.communicate()
    parts = [name for name in gcs.objects("a.npz.parts/") if name.endswith(".npy")]
    assert parts and not gcs.objects("a.npz/") and "a.npz" not in gcs.objects()
    gcs.set_faults(Fault("POST", re.escape(parts[0]), status=403))  # it is not written again
    run_command("mdt_jax.sample", *flags, f"--out={gcs.root}/a.npz")
    assert gcs.read("a.npz") == (tmp_path / "a.npz").read_bytes()
    assert gcs.objects("a.npz") == ["a.npz"]
