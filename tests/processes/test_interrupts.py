"""SIGTERM and Ctrl-C reach a run whatever it does; calls that never end stand in for that."""

import signal
import subprocess
import sys
import time

import pytest

from mdt_jax.weights.step_folders import steps_in
from tests.conftest import ROOT, SMOKE
from tests.runs import steps_of

# The main thread stays in C, where no handler of Python's runs, as in a long compilation.
STUCK = """
import hashlib, sys, time
from mdt_jax import cli, main, sample
from mdt_jax.train import inputs, loop

def stuck(*_):
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)

def waits(self, items, u, take=inputs.sources.Images.take, seen=[]):
    seen.append(0)
    if len(seen) > 5:
        print("stuck", flush=True)
        time.sleep(1000)
    return take(self, items, u)

place, sys.argv = sys.argv[1], sys.argv[1:]
loop.READERS_SECONDS = 2
if place == "compiles":
    loop.compile_step = stuck
elif place == "lists":
    inputs.open_data = stuck
elif place == "reads":
    inputs.sources.Images.take = waits
elif place == "samples":
    cli.backend.start = stuck
cli.run(sample.main if place == "samples" else main.main)
"""


def start(place: str, *flags: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, place, *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n", process.communicate()
    time.sleep(0.5)
    return process


def ends(process: subprocess.Popen) -> tuple[int, list[str]]:
    """(exit code, what it printed to stderr) within a few seconds."""
    _, err = process.communicate(timeout=20)
    assert "Traceback" not in err, err
    return process.returncode, err.splitlines()


@pytest.mark.parametrize("place", ["compiles", "lists"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_starts(place, number, tmp_path):
    process = start(place, *SMOKE, f"--workdir={tmp_path}")
    process.send_signal(number)
    code, lines = ends(process)
    assert code == 128 + number
    assert lines[-1] == "stopped before the first step; the same command resumes"
    assert not any("stopped" in line for line in lines[:-1]) and steps_in(tmp_path) == []


def test_a_run_that_waits_for_data_saves(tmp_path):
    flags = [*SMOKE, "--config.train.steps=100", "--config.train.checkpoint_every=100"]
    process = start("reads", *flags, "--config.train.sample_every=0", f"--workdir={tmp_path}")
    until = time.time() + 100
    while not steps_of(tmp_path) and time.time() < until:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, lines = ends(process)
    (stopped,) = steps_in(tmp_path)
    assert code == 0 and lines[-1] == f"stopped at step {stopped}, saved; the same command resumes"
    assert steps_of(tmp_path) == list(range(1, stopped + 1))


def test_the_second_ctrl_c_ends_any_command(tmp_path):
    process = start("samples", "--checkpoint=x", f"--out={tmp_path}/x.png")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ends(process) == (130, ["stopped at once by the second Ctrl-C"])
