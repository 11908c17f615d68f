"""Training in processes of its own: killed, stopped, counted, on eight devices."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT, SMOKE, run_command, start_command
from tests.runs import LONG, arrays, lines_of, steps_of


def assert_same_run(workdir, reference):
    for item in ("params", "ema", "progress"):
        for a, b in zip(arrays(workdir, item), arrays(reference, item), strict=True):
            np.testing.assert_array_equal(a, b)
    assert steps_of(workdir) == list(range(1, 121))
    for name in ("loss", "grad_norm"):
        values = [
            [json.loads(line)[name] for line in (w / "metrics.jsonl").read_text().splitlines()]
            for w in (workdir, reference)
        ]
        assert values[0] == values[1]


def compilations(*arguments: str) -> int:
    """How often a run compiled its step, counted in JAX's own compile log."""
    printed = run_command("mdt_jax.main", *arguments, JAX_LOG_COMPILES="1")
    finished = re.findall(r"Finished XLA compilation of jit\(step_with_draws\)", printed)
    assert len(finished) == len(re.findall(r"Compiling jit\(step_with_draws\)", printed))
    return len(finished)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The long run, whose checkpoints do not make it compile the step again."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert compilations(*LONG, f"--workdir={workdir}") == 1
    return workdir


def kill_after(workdir, steps: int, number: signal.Signals, seconds: float = 0.0):
    """Start the long run and send a signal once it has logged `steps` steps."""
    assert len(lines_of(workdir)) < steps, "an earlier run has got as far"
    process = start_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    deadline = time.time() + 200
    while len(lines_of(workdir)) < steps:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    return process.returncode, out + err


def test_killed_twice_ends_with_the_same_bits(undisturbed, tmp_path):
    random_ = random.SystemRandom()
    moments = random_.randint(5, 40), random_.randint(60, 90)
    print("killed after steps", moments)  # shown when the test fails
    workdir = tmp_path / "run"
    for moment in moments:
        code, _ = kill_after(workdir, moment, signal.SIGKILL, random_.random() / 20)
        assert code == -signal.SIGKILL
    printed = run_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    assert "resuming from step" in printed
    assert_same_run(workdir, undisturbed)


def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    code, printed = kill_after(workdir, 33, signal.SIGTERM)
    assert code == 0, printed
    stopped = int(re.search(r"stopped at step (\d+), saved", printed)[1])
    assert 33 <= stopped < 120 and (workdir / "checkpoints" / str(stopped)).is_dir()
    assert steps_of(workdir) == list(range(1, stopped + 1))
    assert not (workdir / "report.json").exists()
    printed = run_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    assert f"resuming from step {stopped}" in printed
    assert_same_run(workdir, undisturbed)


def test_the_step_compiles_once(tmp_path):
    """Over 200 steps of MDTv2, whose mask ratio is drawn for each, with a sample grid inside."""
    workdir = tmp_path / "run"
    assert compilations(
        "--config=configs/v2_s2.py:smoke", f"--workdir={workdir}", "--config.train.steps=200",
        "--config.train.sample_every=100", "--config.train.checkpoint_every=100",
        "--config.sample.num_samples=0",
    ) == 1  # fmt: skip
    assert steps_of(workdir) == list(range(1, 201))
    kept = [json.loads(line)["kept"] for line in lines_of(workdir)]
    assert set(kept) == {8, 9, 10, 11}


def test_compiled_programs_are_kept_for_the_next_time(tmp_path):
    code = """
import jax
from mdt_jax.runtime import backend
backend.keep_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.jit(lambda x: x + 1)(1)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    assert any((tmp_path / "mdt_jax" / "xla").iterdir())


def test_few_files_may_be_open(tmp_path):
    """Whichever library it is that cannot open one more, the last thing said names the limit."""
    argv = ["-m", "mdt_jax.main", *SMOKE, "--config.sample.num_samples=0"]
    done = subprocess.run(
        [sys.executable, *argv, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "this process may open 32 at once" in last
