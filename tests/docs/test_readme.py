"""Every command and every line of Python in the README runs, on the recipes' smoke variants."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mdt_jax.evaluation import feature_networks
from mdt_jax.weights import torch_files
from tests.conftest import ROOT, XLA_FLAGS, run_here
from tests.hub_server import released
from tests.small_data import write_pictures, write_vae

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [line for block in blocks("bash") for line in block.strip().splitlines()]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
MODULE_COMMANDS = [line for line in COMMANDS if re.match(r"(\w+=\S+ )?python -m mdt_jax\.", line)]


def run(command: str, folder, **kwargs):
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def here(command: str, folder) -> str:
    """Run it in this process, with Inception on two images at a time."""
    _, _, module, *arguments = shlex.split(smoke(command))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_networks, "EACH_DEVICE", 2)
        return run_here(importlib.import_module(module).main, *arguments, cwd=folder)


def smoke(command: str) -> str:
    """The same command on the smallest variant, in this interpreter."""
    if "latents/" in command:  # on the pictures and the VAE of the fixture
        command += " --config.data.image_size=32 --config.data.channels=3 --config.vae.path=vae"
        command += " --config.model.num_classes=3 --config.vae.scale=1.0"
    command = re.sub(r"(configs/\w+\.py)(?!:)", rf"{ROOT}/\1:smoke", command)
    command = re.sub(r"--config=configs", f"--config={ROOT}/configs", command)
    command = command.replace("train.steps=4000", "train.steps=4")
    command = command.replace("=docs/", f"={ROOT}/docs/").replace(
        "num_samples=50000", "num_samples=8"
    )
    if "evaluate" in command:
        command = command.replace("image_size=256", "image_size=32")
    command = command.replace("evaluation.every=500", "evaluation.every=1").replace(
        "evaluation.num_samples=1000", "evaluation.num_samples=20"
    )
    if "inpaint" in command:
        command += " --num_steps=12"
    if "hf://" in command and "mdt_jax.sample" in command:
        command += " --num_steps=3"
    command = command.replace("num_steps=250", "num_steps=5").replace(
        "num_steps=50", "num_steps=12"
    )
    command = re.sub("^XLA_FLAGS=(\\S+)", rf"XLA_FLAGS='{XLA_FLAGS} \1'", command)
    return command.replace("python", sys.executable, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data, in which the README's first training command has run."""
    folder = tmp_path_factory.mktemp("readme")
    write_pictures(folder / "imagenet" / "train")
    write_pictures(folder / "imagenet" / "val", count=6)
    from tests.fid_packages import random_state

    torch_files.write(folder / "pt_inception-2015-12-05-6726825d.pth", random_state())
    images = load_digits().images[:8].astype(np.uint8)[..., None]
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images)
    write_vae(folder / "vae")
    here(MODULE_COMMANDS[0], folder)
    assert (folder / "runs" / "digits" / "report.json").is_file()
    return folder


def test_no_command_is_left_out():
    known = ("make demo", "make test", "python3 -m venv .venv", "source .venv/bin/activate")
    ran = [*MODULE_COMMANDS, "python benchmarks/convergence.py"]  # the latter by test_benchmarks.py
    rest = [c for c in COMMANDS if c not in known and c not in ran]
    assert all(c.startswith(".venv/bin/pip install -e") for c in rest), rest
    assert len(MODULE_COMMANDS) >= 6 and {"make demo", "make test"} < set(COMMANDS)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with released(tmp_path_factory.mktemp("hub")) as environment:
        yield environment


@pytest.mark.parametrize("command", MODULE_COMMANDS)
def test_module_commands(command, runs, hub):
    """In this process, but for what must be known when Python starts: devices, the hub's address.

    tests/test_commands.py has a real process of each.
    """
    if "hf://" in command or "XLA_FLAGS" in command:
        printed = run(smoke(command), runs, env=ENVIRONMENT | hub)
    else:
        printed = here(command, runs)
    for module, said in (("info", "memory of a step"), ("--verify", "is sound: 24 images")):
        assert said in printed or module not in command
    if "mdt_jax.info" in command:
        return
    if "mdt_jax.evaluate" in command and "--out" not in command:
        assert "rFID" in printed or "wrote these and all settings to" in printed
        return
    out = re.search(r"--(?:out|dst)=(\S+)", command)
    workdir = re.search(r"--workdir=(\S+)", command)
    assert (runs / out[1]).exists() if out else (runs / workdir[1] / "report.json").is_file()


def test_make_demo(tmp_path):
    """With the environment there is; `make test` itself makes one the same way."""
    prefix, workdir = sys.prefix, tmp_path / "demo"
    variables = f"VENV={prefix} CONFIG=configs/digits.py:smoke WORKDIR={workdir}"
    run(f"make demo -o {prefix}/.installed {variables}", ROOT, env=ENVIRONMENT)
    for name in ("samples.npz", "samples.png", "report.json", "metrics.jsonl"):
        assert (workdir / name).is_file()


def test_make_test():
    """CI runs it; from inside itself, only what it would do is looked at."""
    plan = run("make --dry-run test-all VENV=elsewhere PYTHON=python3.12", ROOT)
    assert "python3.12 -m venv elsewhere" in plan
    groups = re.findall(r"^elsewhere/bin/python -m pytest -m \"(.*)\"", plan, re.M)
    rest = "processes or docs or benches or combinations"
    assert groups == [f"not ({rest})", rest]
    for tool in ("ruff check", "ruff format --check", "pyright"):
        assert f"elsewhere/bin/{tool}" in plan
    assert {"make test", "make test-rest"} <= set((ROOT / ".ci" / "run").read_text().splitlines())


def test_make_test_versions():
    plan = run("make --dry-run test-versions OLDEST=python3.13 NEWEST=python3.12", ROOT)
    assert "python3.13 -m venv .versions/oldest" in plan
    assert "python3.12 -m venv .versions/newest" in plan
    assert "install --quiet --constraint=tests/constraints-oldest.txt --editable" in plan
    (paths,) = re.findall(r"-m pytest ([^;]*);", plan)
    assert "tests/docs/test_notebooks.py" in paths
    assert all((ROOT / path).exists() for path in paths.split())


def test_installation(tmp_path):
    """The commands under "On your own", without fetching again what is installed here."""
    (tmp_path / "project").symlink_to(ROOT)
    folder = tmp_path / "project"
    lines = [c for c in COMMANDS if ".venv" in c]
    assert len(lines) == 7
    venv = tmp_path / "venv"
    for line in lines:
        line = line.replace(".venv", str(venv))
        line = line.replace("pip install", "pip install --quiet --no-deps")
        run(f"bash -c '{line}'" if line.startswith("source") else line, folder)
    run(f"{venv}/bin/python -c 'import mdt_jax; print(mdt_jax.__version__)'", tmp_path)


def test_python_blocks(runs, monkeypatch):
    monkeypatch.chdir(runs)
    names = {}
    for block in blocks("python"):
        exec(block.replace("num_steps=50", "num_steps=12"), names)
    assert names["again"].shape == (2, 8, 8, 1) and names["whole"].shape == (5, 8, 8, 1)
    assert names["pixels"].shape == (5, 8, 8, 1) and names["pixels"].dtype == "uint8"
    assert names["out"].shape == names["masked_out"].shape == (2, 8, 8, 2)


def test_links_lead_somewhere():
    headings = {f"#{heading.lower()}" for heading in re.findall(r"^#+ (\w+)$", README, re.M)}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert target in headings or (ROOT / target).is_file(), target
