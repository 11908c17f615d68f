"""What the kernel refuses to write is one clear line, and nothing half-written stays.

A limit on the size of files stands in for the full disk: it needs no rights.
"""

import os
import subprocess
import sys

import pytest

from mdt_jax.weights import kinds, networks
from tests.conftest import ROOT
from tests.models.common import random_params
from tests.published import MODELS
from tests.runs import SAMPLE


def run(*arguments, cwd):
    """The lines that a process prints which may write no file beyond 20 kB."""
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 20 && exec "$@"', "bash", sys.executable, "-m", *arguments],
        cwd=cwd,
        # What is compiled is not kept: the cache would keep half of it.
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
        },
        capture_output=True,
        text=True,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in printed, printed
    return printed.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "v1"
    networks.save(path, kinds.Weights(MODELS["v1"], random_params(MODELS["v1"])))
    return path


@pytest.mark.parametrize("dst", ["a.pt", "a.safetensors", "a"])
def test_convert(dst, folder, tmp_path):
    (line,) = run("mdt_jax.convert", f"--src={folder}", f"--dst={dst}", cwd=tmp_path)
    assert f"{dst} could not be written: " in line and "MB free there" in line
    assert list(tmp_path.iterdir()) == []


def test_sample(trained, tmp_path):
    arguments = ["--num_samples=600", "--num_steps=1", "--guidance_scale=1"]
    line = run(
        "mdt_jax.sample", f"--checkpoint={trained}", "--out=a.npz", *arguments, cwd=tmp_path
    )[-1]
    assert line.startswith("error: a.npz could not be written: File too large (")
    assert "its parts are kept in a.npz.parts, and the same command resumes" in line
    (parts,) = tmp_path.iterdir()
    names = sorted(path.name for path in parts.iterdir())
    assert names == [*(f"{start:09d}.npy" for start in range(0, 600, 100)), "settings.json"]


def test_training(tmp_path):
    config = [f"--config={ROOT}/configs/digits.py:smoke", "--config.train.sample_every=0"]
    line = run("mdt_jax.main", *config, "--workdir=run", cwd=tmp_path)[-1]
    assert line.startswith(f"error: {tmp_path}/run/checkpoints could not be written: ")
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]


def to_stdout(stdout, *arguments: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "-m", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, timeout=200,
    )  # fmt: skip
    return process.returncode, process.stderr


def test_stdout_is_full_or_nobody_reads_it(tmp_path):
    """Files are written all the same."""
    sample = ["mdt_jax.sample", *SAMPLE, "--num_samples=2"]
    with open("/dev/full", "w") as full:
        code, err = to_stdout(full, *sample, f"--out={tmp_path}/full.png")
    last = err.splitlines()[-1]
    assert code == 2 and (tmp_path / "full.png").is_file() and "Exception" not in err
    assert last.startswith("error: stdout could not be written: No space left on device; ")
    assert err.count("error") == 1

    def to_closed_pipe(*arguments):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            return to_stdout(writing, *arguments)
        finally:
            os.close(writing)

    code, err = to_closed_pipe(*sample, f"--out={tmp_path}/closed.png")
    assert code == 141 and (tmp_path / "closed.png").is_file()
    assert all(line.startswith("sampling:") for line in err.splitlines()), err
    assert to_closed_pipe("mdt_jax.sample", "--help")[1] == ""
