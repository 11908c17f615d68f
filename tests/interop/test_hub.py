"""The hub's protocol against a real server, each time from a process that has not met it."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.hub_server import serve

pytest.importorskip("huggingface_hub")
WEIGHTS = bytes(range(256)) * 1000
FILES = {"/someone/model/resolve/main/weights.pt": WEIGHTS}


@pytest.fixture
def server():
    with serve(FILES) as server:
        yield server


@pytest.fixture
def ask(server, tmp_path):
    """ask(path, **environment) → (exit code, the last line printed)."""

    def ask(path, **environment):
        code = f"from mdt_jax.interop.hub import local_path; print(local_path({path!r}))"
        own = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": server.endpoint, **environment}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **own},
        )
        return done.returncode, (done.stdout or done.stderr).strip().splitlines()[-1]

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


@pytest.mark.parametrize(
    "path, environment, message",
    [
        ("hf://someone/model/nothing.pt", {}, "someone/model has no such file"),
        ("hf://nobody/nothing/weights.pt", {}, "no such repository"),
        ("hf://someone/model/weights.pt", {"HF_HUB_OFFLINE": "1"}, "is not in the cache"),
        (
            "hf://someone/model/weights.pt",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "not in the cache",
        ),
        ("hf://someone/model", {}, "write hf://OWNER/REPOSITORY/FILE"),
        ("hf://some one/model/weights.pt", {}, "some one/model"),
    ],
)
def test_what_cannot_be_had(path, environment, message, ask):
    code, line = ask(path, **environment)
    assert code == 1 and line.startswith("mdt_jax.errors.UserError: ") and message in line


def test_a_wrong_hash_is_noticed_and_not_kept(server, ask):
    server.wrong_hash = True
    code, line = ask("hf://someone/model/weights.pt")
    assert code == 1 and "its SHA-256 is" in line
    server.wrong_hash = False
    code, path = ask("hf://someone/model/weights.pt")
    assert code == 0 and pathlib.Path(path).read_bytes() == WEIGHTS
