"""The counts of benchmarks/aot.py, held to known sizes, and the costs of a step on an H100."""

import importlib.util
import json
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import ROOT, exits_with_one_line

SCRIPT = ROOT / "benchmarks" / "aot.py"
CUDA = importlib.util.find_spec("jax_cuda13_plugin") is not None


@pytest.fixture(scope="module")
def hlo():
    return runpy.run_path(str(ROOT / "benchmarks" / "hlo.py"))


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(SCRIPT))


def kernels(hlo, function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo["kernels"](jax.jit(function).lower(*arguments).compile().as_text())


def test_a_matmul(hlo):
    found = kernels(hlo, lambda a, b: a @ b, (128, 256), (256, 64))
    assert sum(each.flops * each.count for each in found) == 2 * 128 * 256 * 64
    assert sum(each.bytes * each.count for each in found) == 4 * (128 * 256 + 256 * 64 + 128 * 64)


def test_a_copy(hlo):
    found = kernels(hlo, lambda x: jnp.copy(x.T), (128, 256))
    assert sum(each.bytes * each.count for each in found) == 2 * 4 * 128 * 256


def test_a_scans_body_counts_as_often_as_it_runs_and_a_slice_as_a_slice(hlo):
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = kernels(hlo, function, (8, 64), (10, 64, 64))
    assert sum(each.flops * each.count for each in found) == 10 * 2 * 8 * 64 * 64
    total = sum(each.bytes * each.count for each in found)
    # Each of ten turns reads a weight of 16 KiB, not the stack, and copies it once at most.
    assert 10 * 4 * 64 * 64 < total < 10 * 4 * (3 * 64 * 64 + 8 * 8 * 64)


def test_asynchronous_and_nested_types(hlo):
    """Lines as compilers for GPUs and TPUs write them."""
    text = """
ENTRY %main (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%p), dimensions={0}
  %d = bf16[64,128]{1,0} all-gather-done(%s), metadata={op_name="jit(f)/gather"}
  %v = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy(%d)
  %t = (s32[], (f32[2]{0}, f32[4]{0})) tuple()
  ROOT %c = bf16[64,128]{1,0} copy(%v)
}
"""
    found = hlo["kernels"](text)
    assert [each.kind for each in found] == ["communication", "between matmuls", "between matmuls"]
    whole = 2 * 64 * 128
    # What lies in a TPU's vector memory is neither read from nor written to the device's memory.
    assert [each.bytes for each in found] == [2 * whole, whole, whole]


@pytest.mark.parametrize("flags, message", [
    (["--target=h101"], "unknown target 'h101'; choose from h100, a100, v5e, v5p"),
    (["--attention=flash"], "train.attention"),
    (["--config=configs/none.py"], "config file 'configs/none.py' does not exist"),
])  # fmt: skip
def test_mistakes(aot, flags, message, capsys, monkeypatch, in_root):
    monkeypatch.setitem(aot["bench"].__globals__, "check_wheels", lambda target: None)
    assert message in exits_with_one_line(aot["bench"], flags, capsys, monkeypatch)


@pytest.mark.parametrize("target, install", [("a100", "[aot]"), ("v5p", "jax[tpu]")])
def test_a_missing_compiler_is_said_in_a_line(aot, target, install, capsys, monkeypatch, in_root):
    monkeypatch.setitem(aot["WHEELS"], "gpu", ("no_such_module", 'pip install -e ".[aot]"'))
    monkeypatch.setitem(aot["WHEELS"], "tpu", ("no_such_module", 'pip install "jax[tpu]"'))
    line = exits_with_one_line(aot["bench"], [f"--target={target}"], capsys, monkeypatch)
    assert f"the compiler for {target} is not installed" in line and install in line


def test_the_predicted_time_is_the_longer_of_arithmetic_and_traffic(aot, hlo):
    def kernel(**changes):
        default = dict(name="k", opcode="fusion", op_name="", type="", kind="matmul", count=1)
        return hlo["Kernel"](**{**default, "bytes": 0, "flops": 0, **changes})

    h100, predicted = aot["TARGETS"]["h100"], aot["predicted"]
    assert predicted(kernel(bytes=27e8), h100) == pytest.approx(1, rel=0.01)
    assert predicted(kernel(bytes=1, flops=65e10), h100) == pytest.approx(1, rel=0.01)
    fused = kernel(opcode="custom-call", kind="attention", flops=15e10)
    assert predicted(fused, h100) == pytest.approx(1, rel=0.01)


# XLA of jax 0.11.2; docs/performance.md has the tables.
GIGABYTES, KERNELS = 29.2, 1288


@pytest.mark.skipif(not CUDA, reason="XLA's CUDA compiler is not installed (the extra aot)")
def test_the_cost_of_a_step_of_s2_on_an_h100(tmp_path):
    command = [
        sys.executable, str(SCRIPT), "--target=h100", "--config=configs/s2.py", "--batch_size=32",
        f"--out={tmp_path / 'aot.json'}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    (row,) = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert row["gigabytes"] == pytest.approx(GIGABYTES, rel=0.05)
    assert row["kernels"] == pytest.approx(KERNELS, rel=0.05)
