"""The hub's protocol against a real server, each time from a process that has not met it."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.hub_server import serve

pytest.importorskip("huggingface_hub")
WEIGHTS = bytes(range(256)) * 1000
VAE = "diffusion_pytorch_model.safetensors"
SCALE = "weights.vae.recorded_scale"
FILES = {
    "/someone/model/resolve/main/weights.pt": WEIGHTS,
    f"/someone/vae/resolve/main/{VAE}": WEIGHTS,
    "/someone/vae/resolve/main/config.json": b'{"scaling_factor": 0.13025}',
    f"/someone/bare/resolve/main/{VAE}": WEIGHTS,
}


@pytest.fixture
def server():
    with serve(FILES) as server:
        yield server


def start(path, home, function="runtime.hub.local_path", **environment):
    """A process that looks for the file and prints where it is, or what else a function says."""
    module, _, name = function.rpartition(".")
    code = (
        f"from mdt_jax import cli; from mdt_jax.{module} import {name}; "
        f"cli.run(lambda _: print({name}({path!r})))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(home), **environment},
    )


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    """Begins before the other tests: the hub's client tries for 20 seconds."""
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    return start("hf://someone/model/weights.pt", tmp_path_factory.mktemp("none"), **nobody)


@pytest.fixture
def ask(server, tmp_path):
    """ask(path, **environment) → (exit code, the one line printed)."""

    def ask(path, **environment):
        own = {"HF_ENDPOINT": server.endpoint, **environment}
        process = start(path, tmp_path / "cache", **own)
        out, err = process.communicate()
        if process.returncode:
            assert err.count("\n") == 1 and not out, err
        return process.returncode, (out or err).strip()

    return ask


def test_download_then_cache_then_offline(server, ask):
    code, path = ask("hf://someone/model/weights.pt")
    assert code == 0 and pathlib.Path(path).read_bytes() == WEIGHTS
    download = "GET /someone/model/resolve/main/weights.pt"
    assert server.requests.count(download) == 1
    assert ask("hf://someone/model/weights.pt") == (0, path)
    assert server.requests.count(download) == 1
    asked = len(server.requests)
    assert ask("hf://someone/model/weights.pt", HF_HUB_OFFLINE="1") == (0, path)
    assert len(server.requests) == asked
    # No server at all: what is in the cache still serves.
    assert ask("hf://someone/model/weights.pt", HF_ENDPOINT="http://127.0.0.1:9") == (0, path)


def test_a_vaes_config_comes_with_it(ask):
    for path, scale in (
        ("hf://someone/vae", "0.13025"), (f"hf://someone/vae/{VAE}", "0.13025"),
        ("hf://someone/bare", "None"),
    ):  # fmt: skip
        assert ask(path, function=SCALE) == (0, scale)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask("hf://someone/vae", function=SCALE, **offline) == (0, "0.13025")


@pytest.mark.parametrize(
    "path, environment, message",
    [
        ("hf://someone/model/nothing.pt", {}, "someone/model has no such file"),
        ("hf://nobody/nothing/weights.pt", {}, "no such repository"),
        ("hf://someone/model/weights.pt", {"HF_HUB_OFFLINE": "1"}, "is not in the cache"),
        ("hf://someone/model", {}, "write hf://OWNER/REPOSITORY[@REVISION]/FILE"),
        ("hf://some one/model/weights.pt", {}, "some one/model"),
    ],
)
def test_what_cannot_be_had(path, environment, message, ask):
    code, line = ask(path, **environment)
    assert code == 2 and line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "fault, message",
    [("wrong_hash", "its SHA-256 is"), ("hangs_up", "could not be downloaded")],
)
def test_a_faulty_download_is_one_line_and_is_not_kept(fault, message, server, ask):
    setattr(server, fault, True)
    code, line = ask("hf://someone/model/weights.pt")
    assert code == 2 and message in line
    setattr(server, fault, False)
    code, path = ask("hf://someone/model/weights.pt")
    assert code == 0 and pathlib.Path(path).read_bytes() == WEIGHTS


def test_a_silent_hub_is_not_waited_for(server, ask):
    code, path = ask("hf://someone/model/weights.pt")
    server.silent = True
    began, soon = time.monotonic(), {"HF_HUB_ETAG_TIMEOUT": "1"}
    assert ask("hf://someone/model/weights.pt", **soon) == (0, path)
    code, line = ask("hf://someone/model/other.pt", **soon)
    assert code == 2 and "is not in the cache and the hub did not answer within 1 s" in line
    assert time.monotonic() - began < 50
    server.silent = False


def test_no_network(no_network):
    out, err = no_network.communicate()
    assert no_network.returncode == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: hf://someone/model/weights.pt is not in the cache and the hub ")
