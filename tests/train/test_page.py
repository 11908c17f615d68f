"""The record of a run, its page and its curves: mdt_jax.report."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from mdt_jax import report
from mdt_jax.train import curves, page, record
from tests.conftest import exits_with_one_line, run_here, train_here
from tests.runs import MEASURING, measured


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of a finished run of four steps."""
    return shutil.copytree(trained, tmp_path / "run")


def test_training_ends_with_the_page(trained):
    text = (trained / "report.html").read_text()
    written = json.loads((trained / "report.json").read_text())
    assert f"<title>{trained}</title>" in text and "Finished after 4 steps." in text
    for title, value in (
        ("Fréchet distance", f"{written['frechet_distance']:.6g}"),
        ("Parameters", f"{written['parameters']:,}"),
        ("model.hidden_size", "16"),
        ("optim.schedule", "&quot;constant&quot;"),
    ):
        assert f'<th scope="row">{title}</th><td>{value}</td>' in text
    titles = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert titles[0] == "Loss" and {"Gradient norm", "Images per second"} < {*titles}
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", text)]
    files = [trained / "samples" / f"000000{step}.png" for step in (2, 4)]
    assert pictures == [file.read_bytes() for file in [*files, trained / "samples.png"]]
    assert Image.open(trained / "curves.png").size[0] == 960


def test_it_loads_nothing_from_elsewhere(trained):
    text = (trained / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']{0,20})", text)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)


def test_the_curves_are_the_log(trained):
    series = record.read(trained).series
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps, values = curves.panels(series)["Loss"]["masked pass"]
    assert steps.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [line["loss/masked"] for line in lines]
    shown = {name for names in curves.PANELS.values() for name in names}
    assert {f"mse/{name}/q{q}" for name in ("full", "masked") for q in range(1, 5)} < shown
    assert {"grad_norm", "images_per_second", "data_wait", "fid", "frechet_distance"} < shown


def test_a_run_that_trains(workdir):
    """It is reported, and no file but the two is written."""
    for name in ("report.json", "report.html", "curves.png", "samples.png"):
        (workdir / name).unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # one being written
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    printed = run_here(report.main, f"--workdir={workdir}")
    assert printed.strip().endswith(
        f"wrote {workdir}/report.html and {workdir}/curves.png: step 3 of 4"
    )
    text = (workdir / "report.html").read_text()
    assert "Step 3 of 4." in text and "<h2>Result</h2>" not in text
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"report.html", "curves.png"}
    assert {path: after[path] for path in before} == before


def test_before_the_first_line_of_the_log(workdir):
    shutil.rmtree(workdir / "samples")
    for name in ("metrics.jsonl", "report.json"):
        (workdir / name).unlink()
    assert "step 0 of 4" in run_here(report.main, f"--workdir={workdir}")
    assert "<h2>Config</h2>" in (workdir / "report.html").read_text()


def test_the_best_checkpoint_and_the_measured_curve(tmp_path):
    train_here(*MEASURING, "--config.train.steps=4", f"--workdir={tmp_path}")
    found = record.read(tmp_path)
    assert found.best in (2, 4)
    distance = measured(tmp_path)[found.best]["frechet_distance"]
    assert found.measured(found.best)["frechet_distance"] == distance
    text = (tmp_path / "report.html").read_text()
    best = text[text.index("<h2>Best checkpoint</h2>") :]
    assert best.index(f"<td>{found.best}</td>") < best.index(f"<td>{distance:.6g}</td>")
    assert 'aria-label="Fréchet distance"' in text


def test_names_are_escaped(workdir):
    odd = workdir.rename(workdir.with_name("<script>alert(1)<&script>"))
    path = odd / "config.json"
    config = json.loads(path.read_text())
    config["data"]["path"] = "</table><img src=x onerror=alert(1)>"
    path.write_text(json.dumps(config))
    run_here(report.main, f"--workdir={odd}")
    text = (odd / "report.html").read_text()
    assert "<script>alert" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(1)&lt;&amp;script&gt;" in text


def test_many_grids_are_thinned(workdir):
    for step in range(5, 60):
        shutil.copy(workdir / "samples" / "0000004.png", workdir / "samples" / f"{step:07d}.png")
    text = page.html(record.read(workdir))
    shown = [int(step) for step in re.findall(r'data-step="(\d+)"', text)]
    assert len(shown) == page.GRIDS - 1 and shown[-1] == 59 and shown == sorted(shown)
    assert f'max="{len(shown) - 1}"' in text


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
def test_long_curves_are_means(count):
    steps, values = np.arange(1, count + 1), np.linspace(0, 1, count)
    values[count // 2] = np.nan
    shown, means = curves.thinned(steps, values)
    assert len(shown) == len(means) <= curves.POINTS and shown[-1] == count
    size = -(-count // 1000)
    if size > 1:
        assert means[0] == pytest.approx(values[:size].mean()) and np.isfinite(means).all()


def test_values_that_are_not_finite_are_gaps(workdir):
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["grad_norm"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, values = record.read(workdir).series["grad_norm"]
    assert np.isnan(values).tolist() == [False, True, False, False]
    page.write(record.read(workdir))


def test_mistakes(workdir, tmp_path, capsys, monkeypatch):
    def mistake(*flags):
        return exits_with_one_line(report.main, flags, capsys, monkeypatch)

    assert "--workdir" in mistake()
    assert "does not exist" in mistake(f"--workdir={tmp_path}/none")
    assert "holds no run: it has no config.json" in mistake(f"--workdir={tmp_path}")
    (workdir / "metrics.jsonl").write_text('{"loss": 1}\n')
    before = (workdir / "report.html").read_bytes()
    assert "line 1 is no line of metrics" in mistake(f"--workdir={workdir}")
    (workdir / "metrics.jsonl").unlink()
    (workdir / "config.json").write_text("{")
    assert "config.json" in mistake(f"--workdir={workdir}")
    assert (workdir / "report.html").read_bytes() == before
