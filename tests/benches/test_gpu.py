"""The stages of benchmarks/gpu.py, with small networks on a CPU."""

import inspect
import itertools
import json
import os
import pathlib
import runpy
import sys
import time

import numpy as np
import pytest

from mdt_jax import config as configs
from tests.benches.test_benchmarks import rows_of, script
from tests.conftest import ROOT, exits_with_one_line

# Of items that differ in their numbers alone, one.
SOME = {
    "a": ["versions", "ceilings", "attention", "xl2", "goldens_v2"],
    "b": ["xl2_scanned"],
    "c": ["sample_1", "losses", "resume", "vae"],
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all stages, which share compiled programs."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def losses(out):
    path = out / "cpu.json"
    script("gpu.py", f"--write_losses={path}", "--small")
    return path


def run_stage(stage, out, *flags):
    """The rows of each item, which must have no reason for stopping early."""
    only = f"--only={','.join(SOME[stage])}"
    printed, _ = script("gpu.py", f"--stage={stage}", "--small", only, f"--out={out}", *flags)
    assert printed == (out / f"{stage}.md").read_text()
    lines = [json.loads(line) for line in (out / "stage.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == stage]
    assert [line["item"] for line in lines] == SOME[stage]
    for line in lines:
        assert line["reason"] == "" and line["rows"] and line["seconds"] > 0, line
        assert (line["device"], line["small"]) == ("cpu", True)
    assert len(rows_of(printed)) > sum(len(line["rows"]) for line in lines)
    assert any((out / "cache").iterdir())
    return {line["item"]: line["rows"] for line in lines}


def test_stage_a(out):
    rows = run_stage("a", out)
    assert {"what": "device", "value": "1 × cpu"} in rows["versions"]
    exact = [row for row in rows["ceilings"] if "float32 matmul" in row]
    assert len(exact) == 3 and all(0 < row["relative error"] < 1e-6 for row in exact)
    (golden,) = rows["goldens_v2"]
    for name in ("forward", "masked", "guided", "10 steps of ddpm", "gradient", "5 losses"):
        assert golden[name] < 2e-6, name
    assert golden["5 updates"] < 1e-4
    cases = itertools.product(("plain", "as cudnn"), ("16", "11 of 16"))
    assert [(row["attention"], row["tokens"]) for row in rows["attention"]] == list(cases)
    for row in rows["attention"]:
        errors = [row[f"error of {name}"] for name in ("output", "dq", "dk", "dv", "dbias")]
        assert all(1e-4 < error < 1e-2 for error in errors)  # of bfloat16
        assert row["same bits twice"] and row["forward and backward, ms"] > row["forward, ms"]
    spec, timed, *kernels = rows["xl2"]
    assert (spec["config"], spec["remat"]) == ("configs/xl2.py:smoke", "dots")
    assert (spec["attention"], spec["blocks"]) == ("plain", "unrolled")
    assert timed["img/s"] > 0 and np.isfinite(timed["loss"])
    assert kernels[0]["kernel"] == "all" and kernels[0]["calls a step"] > 100
    assert kernels[0]["ms a step"] >= kernels[1]["ms a step"] >= kernels[-1]["ms a step"] > 0


def test_stage_b(out):
    spec, timed = run_stage("b", out)["xl2_scanned"]
    assert spec["blocks"] == "scanned"
    assert timed["ms a step"] > 0 and np.isfinite(timed["loss"])


def test_stage_c(out, losses):
    rows = run_stage("c", out, f"--losses={losses}")
    sampled = [(row["sampler"], row["steps"], row["passes"]) for row in rows["sample_1"]]
    assert sampled == [("ddpm", 5, 8), ("ddim", 3, 5)]  # of 10 and 6 with guidance everywhere
    exact, rounded = rows["losses"]
    same, _ = exact.pop("largest difference to cpu in the first tenth"), exact.pop("in all steps")
    assert same == exact["of the means of the last tenth"] == 0
    assert 0 < rounded["of the means of the last tenth"] < 1e-3
    (resumed,) = rows["resume"]
    assert "saved; the same command resumes" in resumed["it printed"]
    assert resumed["equal bits"] and resumed["equal losses"] and resumed["arrays"] > 50
    assert [row["images"] for row in rows["vae"]] == [8, 64]
    assert all(row["img/s"] > 0 for row in rows["vae"])


def test_every_item_can_be_called(gpu):
    for items in gpu["STAGES"].values():
        assert sum(item.seconds for item in items) < 1.1 * gpu["BUDGET"]
        for item in items:
            inspect.signature(gpu["WORK"][item.work]).bind(small=False, out="", **item.arguments)
            if "config" in item.arguments:
                configs.load(str(ROOT / item.arguments["config"]))


def run(gpu, code, tmp_path, seconds):
    command = [sys.executable, "-c", code]
    return gpu["run_process"](command, dict(os.environ), tmp_path / "log", seconds)


def test_a_process_that_hangs_is_killed_with_its_children(gpu, tmp_path):
    code = """
import subprocess, time
child = subprocess.Popen(["sleep", "1000"])
print('{"child": %d}' % child.pid, flush=True)
time.sleep(1000)
"""
    began = time.monotonic()
    (row,), reason = run(gpu, code, tmp_path, 3)
    assert reason == "stopped after 3 s" and time.monotonic() - began < 20
    status = pathlib.Path(f"/proc/{row['child']}/status")

    def dead() -> bool:
        # Without a parent to read its exit code it may remain as a zombie.
        return not status.exists() or "State:\tZ" in status.read_text()

    while not dead() and time.monotonic() - began < 30:
        time.sleep(0.1)
    assert dead()


def test_the_reason_of_a_failure(gpu, tmp_path):
    assert run(gpu, "print('{\"a\": 1}')", tmp_path, 20) == ([{"a": 1}], "")
    reason = run(gpu, "import sys; sys.exit('no memory')", tmp_path, 20)[1]
    assert reason == "exit code 1: no memory"
    reason = run(gpu, "import os; os.abort()", tmp_path, 20)[1]
    assert reason.startswith("ended by signal 6: it printed nothing")
    assert "no memory" in (tmp_path / "log").read_text()


def test_an_item_that_fails_does_not_end_the_stage(gpu, tmp_path, capsys):
    bad = gpu["Item"]("bad", 100, "goldens", {"version": "v3"})
    late = gpu["Item"]("late", 10_000, "versions")
    items = [bad, late, gpu["Item"]("versions", 20, "versions")]
    tables = gpu["run_stage"]("a", items, tmp_path, True, "")
    lines = [json.loads(line) for line in (tmp_path / "stage.jsonl").read_text().splitlines()]
    assert lines[0]["reason"] == "KeyError: 'v3'" and lines[0]["reason"] in tables
    assert lines[1]["reason"].endswith("s are left of about 10000") and lines[1]["rows"] == []
    assert lines[2]["reason"] == "" and "| device | 1 × cpu |" in tables
    assert "late" not in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "a.log").read_text()


def test_kernels_of_a_gpu(gpu):
    """The streams of the device alone; XLA's names without their numbers."""
    import gpu_runs
    from jax.profiler import ProfileData

    names = dict(enumerate(("loop_fusion_3", "loop_fusion.12", "gemm_128x128_tn", "host"), 1))
    metadata = " ".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for i, name in names.items()
    )
    events = " ".join(f"events {{ metadata_id: {i} duration_ps: {i}000000 }}" for i in (1, 2, 3))
    trace = ProfileData.from_text_proto(f"""
        planes {{ name: "/device:GPU:0" {metadata}
          lines {{ name: "Stream #13(Compute)" {events} }} lines {{ name: "XLA Ops" {events} }} }}
        planes {{ name: "/host:CPU" {metadata}
          lines {{ name: "python" events {{ metadata_id: 4 duration_ps: 9000000 }} }} }}
    """)
    everything, *rows = gpu_runs.kernels(trace, 2)
    assert everything["ms a step"] == pytest.approx(3e-3) and everything["calls a step"] == 1.5
    got = [(row["kernel"], row["calls a step"], row["share"]) for row in rows]
    assert sorted(got) == [("gemm_128x128_tn", 0.5, "50.0%"), ("loop_fusion", 1.0, "50.0%")]


def test_the_environment_on_a_gpu(gpu, tmp_path, monkeypatch):
    known = True

    def find_device(environment):
        if "XLA_FLAGS" in environment and not known:
            raise gpu["UserError"]("unknown flag")
        return {"platform": "gpu", "kind": "NVIDIA H100"}

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setitem(gpu["prepare"].__globals__, "find_device", find_device)
    device, environment = gpu["prepare"](tmp_path, False)
    assert device["kind"] == "NVIDIA H100"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    assert environment["XLA_FLAGS"].startswith("--xla_gpu_dump_autotune_results_to=/")
    known = False
    assert "XLA_FLAGS" not in gpu["prepare"](tmp_path, False)[1]


def test_an_unknown_flag_of_xla_is_found(gpu, tmp_path):
    find, known = gpu["find_device"], "--xla_gpu_dump_autotune_results_to="
    environment = {**os.environ, "XLA_FLAGS": f"{known}{tmp_path / 'results.txt'}"}
    assert find(environment) == {"platform": "cpu", "kind": "cpu"}
    with pytest.raises(gpu["UserError"], match="xla_no_such"):
        find({**environment, "XLA_FLAGS": "--xla_no_such_flag=1"})


def test_a_missing_package_is_named(gpu, tmp_path, monkeypatch):
    import gpu_runs

    find = gpu_runs.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "grain" else find(n))
    with pytest.raises(gpu["UserError"], match="packages that are missing: grain$"):
        next(gpu_runs.resume(True, str(tmp_path)))


def test_mistakes_are_one_line(gpu, losses, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.json"
    other.write_text("{}")
    for flags, message in (
        (["--stage=a"], "no GPU: JAX finds only the platform cpu"),
        (["--stage=d"], "invalid choice: 'd'"),
        ([], "--stage is missing"),
        (["--stage=b", "--only=xl2_128,vae"], "--only=vae: stage b has xl2_unrolled, "),
        (["--stage=c", f"--losses={tmp_path / 'none'}"], "does not exist"),
        (["--stage=c", f"--losses={other}"], "holds no losses"),
        (["--stage=c", f"--losses={losses}"], "are --small"),
    ):
        argv = [*flags, f"--out={tmp_path / 'out'}"]
        assert message in exits_with_one_line(gpu["bench"], argv, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()
