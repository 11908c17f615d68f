"""Every command and every line of Python on the pages runs, on the recipes' smoke variants."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from mdt_jax.weights import torch_files
from tests.conftest import ROOT
from tests.docs.pages import (
    ALL_COMMANDS,
    MODULE_COMMANDS,
    PAGE_COMMANDS,
    PAGES,
    blocks,
    commands,
    run_smoke,
    smoke,
)
from tests.hub_server import released
from tests.small_data import write_parquet, write_pictures, write_vae

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(command: str, folder, **kwargs):
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, in which the pages' first training command has run."""
    folder = tmp_path_factory.mktemp("pages")
    write_pictures(folder / "imagenet" / "train")
    write_pictures(folder / "imagenet" / "val", count=6)
    write_pictures(folder / "photos")
    write_pictures(folder / "emoji" / "train")
    write_pictures(folder / "emoji" / "test", count=6, seed=1)
    (folder / "imagenet-1k").mkdir()
    write_parquet(folder / "imagenet" / "train", folder / "imagenet-1k" / "data")
    from tests import dinov2, fid_packages

    inception = folder / "pt_inception-2015-12-05-6726825d.pth"
    torch_files.write_arrays(inception, fid_packages.random_state())
    torch_files.write_arrays(folder / "dinov2_vitl14_pretrain.pth", dinov2.random_state())
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images)
    write_vae(folder / "vae")
    run_smoke(MODULE_COMMANDS[0], folder)
    assert (folder / "runs" / "digits" / "report.json").is_file()
    return folder


def test_no_command_is_left_out():
    elsewhere = {"make demo", "make docs", "make lint", "make test", "make test-all"}
    elsewhere |= {"python3 -m venv .venv", "source .venv/bin/activate"}
    # test_convergence.py and test_performance.py run these.
    elsewhere |= {"python benchmarks/convergence.py", "python benchmarks/run.py --suite=cpu"}
    # test_reproduce.py runs it with small networks, test_emoji.py on a small package.
    elsewhere |= {"python benchmarks/reproduce.py --row=mdtv2-xl2-g", "python benchmarks/emoji.py"}
    # test_aot.py compiles a smaller network, where the compiler is installed.
    elsewhere |= {
        "python benchmarks/aot.py --target=h100 --config=configs/xl2.py --batch_size=32",
    }
    elsewhere |= {*PAGE_COMMANDS}  # tests/demo/test_server.py runs these.
    # tests/processes/test_launch.py runs these.
    elsewhere |= set(commands(ROOT / "docs" / "tpu-pods.md"))
    rest = [c for c in ALL_COMMANDS if c not in elsewhere and c not in MODULE_COMMANDS]
    assert all(c.startswith(".venv/bin/pip install -e") for c in rest), rest
    assert len(MODULE_COMMANDS) >= 30 and "make demo" in ALL_COMMANDS


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with released(tmp_path_factory.mktemp("hub")) as environment:
        yield environment


@pytest.fixture(scope="module")
def bucket(gcs_process):
    """What takes the place of gs://my-bucket."""
    gcs_process.make_bucket()
    return gcs_process


@pytest.mark.parametrize("command", [c for c in MODULE_COMMANDS if "gs://" in c], ids=str)
def test_commands_on_buckets(command, folder, bucket, monkeypatch):
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    run_smoke(command.replace("gs://my-bucket", bucket.root), folder)
    (out,) = re.findall(r"--(?:out|workdir)=gs://my-bucket/(\S+)", command)
    assert {out, f"{out}/report.json"} & {*bucket.objects(out)}


@pytest.mark.parametrize("command", [c for c in MODULE_COMMANDS if "gs://" not in c], ids=str)
def test_module_commands(command, folder, hub):
    """In this process, but for what must be known when Python starts: devices, the hub's address.

    tests/test_commands.py has a real process of each.
    """
    if "hf://" in command or "XLA_FLAGS" in command or "--jax_" in command:
        printed = run(smoke(command), folder, env=ENVIRONMENT | hub)
    else:
        printed = run_smoke(command, folder)
    if "mdt_jax.info" in command:
        assert ("# Config fields" if "--fields" in command else "memory of a step") in printed
        return
    assert "is sound: 24 images" in printed or "--verify" not in command
    if "mdt_jax.evaluate" in command and "--out" not in command:
        assert "rFID" in printed or "wrote these and all settings to" in printed
        return
    if "--estimate_scale" in command:
        assert "vae.scale: " in printed and "--config.vae.shift=" in printed
        return
    if "--dst=hf://" in command:
        assert "uploaded" in printed
        return
    out = re.search(r"--(?:out|dst)=(\S+)", command)
    workdir = re.search(r"--workdir=(\S+)", command)
    assert (folder / out[1]).exists() if out else (folder / workdir[1] / "report.json").is_file()


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
    """The README's commands, without fetching again what is installed here."""
    (tmp_path / "project").symlink_to(ROOT)
    folder = tmp_path / "project"
    lines = [c for c in ALL_COMMANDS if ".venv" in c]
    assert len(lines) == 8
    venv = tmp_path / "venv"
    for line in lines:
        line = line.replace(".venv", str(venv))
        line = line.replace("pip install", "pip install --quiet --no-deps")
        run(f"bash -c '{line}'" if line.startswith("source") else line, folder)
    run(f"{venv}/bin/python -c 'import mdt_jax; print(mdt_jax.__version__)'", tmp_path)


def test_python_blocks(folder, monkeypatch):
    """All blocks of a page run one after the other, as a reader would paste them."""
    monkeypatch.chdir(folder)
    names = {}
    for page in PAGES:
        for block in blocks(page, "python"):
            exec(block.replace("num_steps=50", "num_steps=12"), names)
    assert names["again"].shape == (2, 8, 8, 1) and names["whole"].shape == (5, 8, 8, 1)
    assert names["pixels"].shape == (5, 8, 8, 1) and names["pixels"].dtype == "uint8"
    assert names["out"].shape == names["masked_out"].shape == (2, 8, 8, 2)
