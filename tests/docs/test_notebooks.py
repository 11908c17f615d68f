"""Every notebook, from its first cell to its last, in a kernel of its own."""

import json
import re
import sys

import numpy as np
import pytest

import mdt_jax
from tests.conftest import ROOT
from tests.hub_server import released

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def kernel(tmp_path, monkeypatch):
    """This Python as the kernel, without what a user's own settings would change."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def execute(name, tmp_path, parameters):
    """Run it in an empty folder where configs/ is; returns the text and the number of pictures."""
    notebook = read(name, parameters)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    return outcome(notebook, folder)


def read(name, parameters):
    """The notebook with a cell behind its parameters that sets others."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    (place,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
    return notebook


def outcome(notebook, folder):
    """(what it printed, the number of its pictures), run in a folder."""
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return text, pictures


TINY = 'RELEASED, RECIPE, WORKDIR = False, "configs/digits.py:smoke", "runs/smoke"'


@pytest.mark.parametrize(
    "name, pictures, words",
    [
        ("sample.ipynb", 3, "all values equal: True"),
        ("masking.ipynb", 7, "11 of 16 tokens are kept"),
    ],
)
def test_with_a_small_model_trained_in_it(name, pictures, words, tmp_path):
    text, drawn = execute(name, tmp_path, TINY)
    assert words in text and drawn == pictures


@pytest.mark.parametrize(
    "name, pictures, words",
    [
        ("sample.ipynb", 3, ["MDT v2", "[207, 360, 387, 974]", "all values equal: True"]),
        ("masking.ipynb", 6, ["MDT v1", "11 of 16 tokens are kept", "t = 750"]),
    ],
)
def test_with_released_weights(name, pictures, words, tmp_path, monkeypatch):
    """The guarded cells, too: small networks by the names of the released ones."""
    pytest.importorskip("torch")
    with released(tmp_path) as environment:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        text, drawn = execute(name, tmp_path, "RELEASED = True")
    assert all(word in text for word in words) and drawn == pictures


def test_the_plot_is_over_steps_whatever_else_the_log_holds(tmp_path, monkeypatch):
    """A run that logs each third step, and has measured its samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["full", "masked", *(f"full/q{q}" for q in range(1, 5))]
    losses = {f"mse/{name}": 0.5 for name in names}
    lines = [{"step": step, "loss": 1.0, **losses} for step in range(3, 31, 3)]
    lines.insert(5, {"step": 15, "frechet_distance": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = nbformat.read(ROOT / "notebooks" / "train_digits.ipynb", as_version=4).cells
    (plot,) = (cell.source for cell in cells if "axes[0].plot" in cell.source)
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    exec(plot, {"WORKDIR": tmp_path, "json": json, "np": np, "plt": plt})
    for axis in figures[0].axes:
        assert all(list(line.get_xdata()) == list(range(3, 31, 3)) for line in axis.lines)
    plt.close("all")


COLAB = """
import os, sys, types
colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
colab.drive = types.SimpleNamespace(mount=lambda path: os.makedirs(f"{path}/MyDrive"))
colab.output = None  # for JAX's debugger
"""


def test_on_colab_it_clones_the_project_keeps_jax_and_saves_to_drive(tmp_path, monkeypatch):
    """Where the repository is a copy of this one, pip only says what it would do, and Drive is a
    folder here."""
    notebook = read("train_digits.ipynb", TINY)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(COLAB))
    for cell in notebook.cells:
        cell.source = cell.source.replace("%pip install --quiet", "%pip install --dry-run")
        cell.source = cell.source.replace("SAVE_TO_DRIVE = False", "SAVE_TO_DRIVE = True")
        cell.source = cell.source.replace("/content/drive", f"{tmp_path}/drive")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{ROOT}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/mdt-jax/mdt_jax")
    (tmp_path / "content").mkdir()
    text, drawn = outcome(notebook, tmp_path / "content")
    assert '"class_agreement"' in text and drawn == 3
    assert (tmp_path / "content" / "mdt_jax" / "runs" / "smoke" / "report.json").is_file()
    assert (tmp_path / "drive" / "MyDrive" / "mdt_jax" / "smoke" / "checkpoints" / "2").is_dir()
    would = " ".join(re.findall(r"Would install ([^\r\n]*)", text)).split()
    assert f"mdt_jax-{mdt_jax.__version__}" in would
    assert not any(re.match("jax|numpy", package) for package in would)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_committed_holds_no_outputs_and_leaves_jax_alone(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    installs = [line for cell in cells for line in cell.source.splitlines() if "%pip" in line]
    project, needed = installs
    assert "--no-deps" in project
    # The versions that are there already, so that pip has nothing to do to them.
    assert "jax=={version('jax')} jaxlib=={version('jaxlib')}" in cells[0].source
    assert "{KEPT}" in needed
