import json
import re
import runpy
import subprocess
import sys

import pytest

from tests.conftest import ROOT, exits_with_one_line


def test_converting_there_and_back(monkeypatch, capsys):
    bench = runpy.run_path(str(ROOT / "benchmarks" / "convert.py"))
    monkeypatch.setitem(bench["SIZES"], "S", {"hidden_size": 128, "depth": 6, "num_heads": 2})
    monkeypatch.delitem(bench["MODELS"], "MDT")
    bench["bench"](["convert.py", "--size=S"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "× the file" in line]
    assert [row.partition(" |")[0] for row in rows] == ["| MDTv2-S/2", "| DiT-S/2"]


def test_what_the_pipeline_reads(tmp_path, capsys):
    bench = runpy.run_path(str(ROOT / "benchmarks" / "data.py"))
    few = ["--images=12", "--latents=80", "--seconds=0.1", "--workers=0,1"]
    bench["bench"](["data.py", *few, f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    for source in (
        "images of a folder", "images of a tar", "images of parquet, 10 in a row group",
        "images of parquet, 1,000 in a row group", "latents of a cache",
    ):  # fmt: skip
        assert re.search(rf"\| {source} \|( [1-9][0-9,]* \|){{3}}", printed), printed
    # The work of a trained image is what the recipes' cost says.
    assert re.search(r"MDT-XL/2 \| 1.25 \| 794 \| 397 ", printed)
    report = json.loads((tmp_path / "data.json").read_text())
    assert report["rates"]["latents of a cache"]["0"]["per_second"] > 0


def script(name, *arguments, expect=0):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_memory_on_many_devices(tmp_path):
    """The state of two devices that share it is about half of one's; more images need more."""
    recipe = tmp_path / "deep.py"  # as deep as scanned networks are: there, remat is what counts
    recipe.write_text(
        "from mdt_jax import config as configs\n\n"
        "def get_config():\n"
        "    config = configs.default()\n"
        "    config.model.update(hidden_size=64, depth=30, num_heads=4)\n"
        "    return config\n"
    )
    flags = [f"--config={recipe}", "--devices=2", "--dtype=float32", f"--out={tmp_path}"]
    rows = []
    for meshes in (["--fsdp=1,2", "--remat=none"], ["--fsdp=1", "--remat=dots,full"]):
        printed, _ = script("scale.py", *flags, *meshes, "--batch_size=64")
        assert printed.count("| TPU v5e, 16 GB |") == 2
        rows += json.loads((tmp_path / "scale.json").read_text())
    assert [(row["fsdp"], row["remat"]) for row in rows] == [
        (1, "none"), (2, "none"), (1, "dots"), (1, "full"),
    ]  # fmt: skip
    whole, shared, partly, recomputed = rows
    assert 0.5 <= shared["state"] / whole["state"] < 0.6
    assert recomputed["temporary"] < 0.5 * partly["temporary"] < 0.3 * whole["temporary"]
    assert all(row["seconds"] > 0 for row in rows)
    _, said = script("scale.py", *flags, "--fsdp=1", "--remat=none", "--batch_size=3", expect=2)
    assert "data.batch_size 3 is not divisible by the 2 devices" in said.splitlines()[-1]


def test_a_soak_does_not_write_over_another(tmp_path):
    _, said = script("soak.py", f"--out={tmp_path}", expect=2)
    assert said == f"error: {tmp_path} exists already\n"


@pytest.fixture(scope="module")
def sampling():
    return runpy.run_path(str(ROOT / "benchmarks" / "sampling.py"))


def rows_of(printed):
    """The cells of the lines of markdown tables."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_sampling_quality(sampling, trained, tmp_path, capsys):
    """Every sampler with few steps, really drawn; and again from what is there."""
    from PIL import Image

    flags = ["sampling.py", f"--checkpoint={trained}", "--samples=12", "--steps=2,3", "--seeds=0,1"]
    sampling["bench"]([*flags, f"--out={tmp_path}"])
    printed, log = capsys.readouterr()
    rows = rows_of(printed)
    assert rows[0] == ["steps", "2", "3"]
    names = ["DDPM", "DDIM", "DDIM, η = 1", "DPM-Solver++(2M)", "its SDE form", "Heun"]
    assert [re.sub(", (even|log_snr|karras)$", "", row[0]) for row in rows[2:8]] == names
    assert rows[7][1].endswith("(3)") and rows[7][2].endswith("(5)")  # Heun's evaluations
    assert rows[14][0] == "*real training images*" and len({row[0] for row in rows[2:14]}) == 12
    assert rows[17][0] == "DDPM, 3 steps" and rows[17][3] == "1.00"
    assert len(rows) == 18 + 9 and rows[-1][:2] == ["Heun, karras, 3 steps", "5"]
    report = json.loads((tmp_path / "sampling.json").read_text())
    # Each way at both, and with the second seed DDPM's longest and the nine at three steps.
    assert len(report["cells"]) == 2 * 12 + 1 + 9
    assert len(log.splitlines()) >= len(report["cells"])
    assert Image.open(tmp_path / "sampling.png").size[0] > 500

    dropped = report["cells"].pop()
    (tmp_path / "sampling.json").write_text(json.dumps(report))
    sampling["bench"]([*flags, f"--out={tmp_path}"])
    again, log = capsys.readouterr()
    assert again == printed and log.count("sampler=") == 1
    cells = json.loads((tmp_path / "sampling.json").read_text())["cells"]
    assert cells[-1] == dropped


def test_sampling_skips_guidance(sampling, trained, tmp_path, capsys):
    flags = [f"--checkpoint={trained}", "--samples=4", "--steps=30"]
    sampling["bench"](["sampling.py", "--suite=skip", *flags, f"--out={tmp_path}"])
    table = rows_of(capsys.readouterr().out)[2:]
    rows = json.loads((tmp_path / "skip.json").read_text())["rows"]
    assert [row["tolerance"] for row in rows] == [0, 1e-4, 1e-3, 1e-2]
    assert table[0][1:4] == ["30", "960", "0.0%"]  # 30 steps, 2 halves, 16 tokens
    assert rows[0]["largest_difference"] == rows[0]["pixels_that_differ"] == 0
    saved = [row["saved"] for row in rows]
    assert saved == sorted(saved) and 0.05 < saved[-1] < 0.5
    for row in rows:
        assert row["token_passes"] == (30 + row["doubled"]) * 16
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0


def test_mistakes_in_sampling_are_one_line(trained, tmp_path, capsys, monkeypatch, sampling):
    out = tmp_path / "out"
    for arguments, message in (
        (["--suite=all"], "invalid choice"),
        (["--steps=0"], "--steps"),
        (["--steps=5,x"], "--steps"),
        (["--samples=1"], "--samples"),
        ([f"--checkpoint={tmp_path / 'none'}"], "none"),
        ([f"--checkpoint={trained}", "--steps=2000"], "num_steps is 2000"),
    ):
        argv = [*arguments, f"--out={out}"]
        assert message in exits_with_one_line(sampling["bench"], argv, capsys, monkeypatch)
    assert not out.exists()


def test_what_the_measures_cost(tmp_path, capsys):
    bench = runpy.run_path(str(ROOT / "benchmarks" / "evaluation.py"))["bench"]
    out = tmp_path / "evaluation.json"
    bench(["x", "--samples=300", "--references=200", "--size=32", f"--out={out}"])
    assert "| 300 and 200 × 32 | s | CPU s | peak GB |" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]][1:] == [
        "Fréchet distance", "precision and recall", "kernel distance"
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0.01 for row in report["rows"])


def test_metrics_of_few_samples(tmp_path, capsys):
    """FID is too large for few samples; KID is right in the mean."""
    bench = runpy.run_path(str(ROOT / "benchmarks" / "few_samples.py"))["bench"]
    out = tmp_path / "few.json"
    small = ["--size=16", "--references=500", "--many=4000", "--repeats=30", "--numbers", "250"]
    bench(["x", f"--out={out}", *small])
    assert "| 250 | FID |" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    few_fid, few_kid, fid, kid = rows
    assert few_kid["samples"] == 250 and fid["samples"] == kid["samples"] == 4000
    for model in (0, 1):
        assert few_fid["means"][model] > fid["means"][model] + 2 * few_fid["deviations"][model]
        error = few_kid["deviations"][model] / 30**0.5
        assert abs(few_kid["means"][model] - kid["means"][model]) < 4 * error
