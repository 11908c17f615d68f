import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Calls a program with large buffers; prints the pages that later calls fault in.
SCRIPT = """
import resource, sys
from mdt_jax.runtime import backend
kept = len(sys.argv) > 1 and backend.keep_freed_memory()
import jax, jax.numpy as jnp
def f(x):
    for _ in range(2):
        x = jnp.tanh(x @ x.T @ x)
    return x.sum()
f, x = jax.jit(f), jnp.ones((1024, 8192))
for _ in range(2):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    f(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
QUIET = {"JAX_PLATFORMS": "cpu", **dict.fromkeys(
    ("MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
)}  # fmt: skip


def python(script, *arguments, **environment):
    given = {**os.environ, **QUIET, **environment}
    given = {name: value for name, value in given.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, env=given, text=True,
        capture_output=True, check=True,
    ).stdout.split()  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_a_call_frees_is_there_for_the_next():
    _, faults = python(SCRIPT)
    kept, fewer = python(SCRIPT, "keep")
    assert kept == "True"
    assert int(faults) > 20_000 and int(fewer) < int(faults) / 20


ASK = "from mdt_jax.runtime import backend; print(backend.keep_freed_memory())"


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_PLATFORMS": "cuda,cpu"},
        {"MALLOC_ARENA_MAX": "4"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    ],
    ids=str,
)
def test_left_alone(environment):
    """Beside an accelerator, and where the user has set malloc up."""
    assert python(ASK, **environment) == ["False"]
