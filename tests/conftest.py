"""Compilations are cached between tests, and between the processes they start."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_COMPILATION_CACHE_DIR=str(ROOT / ".jax_cache"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.5",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
)

# Where numbers are not held to the published ones, LLVM's optimisations are left out: compiling a
# training step takes half the time.
FAST_COMPILE = {"xla_backend_optimization_level": 0}

SMOKE = "--config=configs/digits.py:smoke"


def start_command(*arguments: str, **environment: str) -> subprocess.Popen:
    """Start `python -m …` from the root of the project in a process of its own."""
    flags = f"--xla_backend_optimization_level=0 {environment.pop('XLA_FLAGS', '')}"
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(*arguments: str, expect: int = 0, **environment: str) -> str:
    """Run it to its end; returns what it printed, stdout and stderr together."""
    process = start_command(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


@pytest.fixture
def in_root(monkeypatch):
    """Run the test from the root of the project, as the README says."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def keep_signals():
    """Put back what a training run in this process does to SIGTERM and SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished smoke run."""
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    run_command("mdt_jax.main", SMOKE, f"--workdir={workdir}")
    return workdir
