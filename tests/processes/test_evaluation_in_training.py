"""Runs that measure their samples, in processes of their own: stopped, on eight devices."""

import signal
import time

import pytest

from mdt_jax.weights.step_folders import steps_in
from tests.conftest import XLA_FLAGS, run_command, start_command, train_here
from tests.runs import MEASURING, lines_of, measured


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of six undisturbed steps."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    train_here(*MEASURING, "--config.train.steps=6", f"--workdir={workdir}")
    return workdir


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_while_it_measures(run, tmp_path, number):
    """The state was saved before; the same command measures that step again, and no other."""
    long = [*MEASURING, "--config.train.steps=6", f"--workdir={tmp_path}"]
    # So many samples that it takes longer than a checkpoint on a slow disk.
    slow = [flag for flag in long if "num_samples=30" not in flag]
    slow += ["--config.evaluation.num_samples=1000000", "--config.evaluation.every=4"]
    process = start_command("mdt_jax.main", *slow)
    until = time.time() + 200
    while len(lines_of(tmp_path)) < 4 or 4 not in steps_in(tmp_path):
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert len(lines_of(tmp_path)) == 4 and measured(tmp_path) == {}
    if number == signal.SIGTERM:
        assert process.returncode == 0, out + err
        assert "stopped at step 4, saved; the same command resumes" in err
    printed = train_here(*long)
    assert "resuming from step 4" in printed
    found = measured(tmp_path)
    assert list(found) == [4, 6]
    whole = measured(run)
    assert found == {step: whole[step] for step in (4, 6)}
    # Again nothing is measured twice.
    (tmp_path / "report.json").unlink()
    train_here(*long)
    assert measured(tmp_path) == found


def test_on_the_mesh_of_the_run(run, tmp_path):
    """Eight devices, four of which share the parameters: the same figures but for rounding."""
    eight = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
    flags = [*MEASURING, "--config.train.steps=2", "--config.mesh.fsdp=4", f"--workdir={tmp_path}"]
    run_command("mdt_jax.main", *flags, XLA_FLAGS=eight)
    ours, theirs = measured(tmp_path)[2], measured(run)[2]
    assert ours == pytest.approx(theirs, rel=1e-2, abs=0.1)
    assert ours["frechet_distance"] == pytest.approx(theirs["frechet_distance"], rel=1e-3)
