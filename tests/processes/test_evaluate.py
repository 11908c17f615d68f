"""Measuring in processes of its own: killed, several as one."""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, XLA_FLAGS
from tests.measuring import assert_equal, flags, make_sets, measured, quick_inception
from tests.processes.together import all_well, free_port

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    with quick_inception():
        return make_sets(tmp_path_factory.mktemp("sets"))


# Two images a device at once, as in the fixture, and slices of four, so that few are many.
SMALL = (
    "from mdt_jax import cli, evaluate; "
    "from mdt_jax.evaluation import feature_networks, features; "
    "feature_networks.EACH_DEVICE = 2; features.SLICE = 4; "
    "cli.run(evaluate.main)"
)


def test_killed_on_eight_devices_in_slices_and_resumed_on_one(sets, tmp_path):
    """kill -9 while the reference is measured: what is done is not done again, and all is equal."""
    out = tmp_path / "card.json"
    command = [sys.executable, "-c", SMALL, *flags(sets), f"--out={out}"]
    eight = {**os.environ, "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"}
    process = subprocess.Popen(command, cwd=ROOT, env=eight, stderr=subprocess.DEVNULL)
    parts, until = tmp_path / "card.json.features", time.time() + 200
    while not list(parts.glob("reference/*.npz")):
        assert process.poll() is None and time.time() < until
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*/*.npz")}
    assert {path.parent.name for path in kept} == {"samples", "reference"} and not out.exists()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for path, written in kept.items():
            try:
                assert path.stat().st_mtime_ns == written
            except FileNotFoundError:
                break
        time.sleep(0.05)
    assert process.returncode == 0 and not parts.exists()
    assert_equal(measured(out), measured(sets / "card.json"))


def test_several_processes_measure_as_one(sets, tmp_path):
    host, out = f"127.0.0.1:{free_port()}", tmp_path / "card.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SMALL, *flags(sets), f"--out={out}",
             f"--distributed={host}", "--num_processes=2", f"--process_id={n}"],
            cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in range(2)
    ]  # fmt: skip
    assert "FID" in all_well(processes)
    assert_equal(measured(out), measured(sets / "card.json"))
