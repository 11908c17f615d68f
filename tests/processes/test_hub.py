"""The hub's client against a real server, each time from a process that has not met it."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, start_command
from tests.hub_server import serve
from tests.runs import DIGITS

pytest.importorskip("huggingface_hub")
WEIGHTS = bytes(range(256)) * 1000
VAE = "diffusion_pytorch_model.safetensors"
NORM = "weights.vae.recorded_norm"
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
    for path, norm in (
        ("hf://someone/vae", "{'scale': 0.13025}"),
        (f"hf://someone/vae/{VAE}", "{'scale': 0.13025}"),
        ("hf://someone/bare", "{}"),
    ):  # fmt: skip
        assert ask(path, function=NORM) == (0, norm)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask("hf://someone/vae", function=NORM, **offline) == (0, "{'scale': 0.13025}")


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


# --- Uploads


@pytest.fixture
def upload(server, tmp_path):
    """upload(src, **environment): a process of `convert` to someone/net."""

    def upload(src=DIGITS, **environment):
        own = {
            "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "uploader"),
            "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1", **environment,
        }  # fmt: skip
        return start_command("mdt_jax.convert", f"--src={src}", "--dst=hf://someone/net", **own)

    return upload


SAMPLES = """
import sys, numpy as np, jax, mdt_jax
from mdt_jax.weights.kinds import params_sha256
pipeline = mdt_jax.load(sys.argv[1])
print(params_sha256(pipeline.params), pipeline.config.to_json(sort_keys=True))
print(pipeline.generate([3, 1, 4], seed=2).tobytes().hex())
"""


def test_a_run_through_the_hub_to_another_machine(server, upload, trained, tmp_path):
    """A process with another cache, and only a token to read, has the run to the bit."""
    out, err = (process := upload(trained)).communicate()
    assert process.returncode == 0 and "/someone/net/commit/" in out, err
    assert server.repositories["someone/net"].private
    printed = []
    for path in ("hf://someone/net", str(trained)):
        done = subprocess.run(
            [sys.executable, "-c", SAMPLES, path],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_reader",
                 "HF_HOME": str(tmp_path / "reader")},
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]


def test_killed_in_the_middle_of_an_upload(server, upload):
    """Nothing is to be seen; the same command does the rest."""
    server.stalls_uploads = True
    process = upload()
    assert server.half_uploaded.wait(60)
    process.kill()
    process.communicate()
    server.resumed.set()
    repository = server.repositories["someone/net"]
    assert {*repository.files} == {".gitattributes"}
    server.stalls_uploads = False
    process = upload()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert {"model.safetensors", "config.json", "README.md"} < {*repository.files}
    assert len(repository.commits) == 2


def failed(process) -> str:
    """The one line of a process that failed, after one that says what it began to upload."""
    out, err = process.communicate()
    assert process.returncode == 2 and not out, out + err
    *before, line = err.splitlines()
    assert len(before) <= 1 and all(each.startswith("uploading ") for each in before), err
    assert line.startswith("error: hf://someone/net")
    return line


def test_a_network_that_cuts_uploads(server, upload):
    server.cuts_uploads = True
    line = failed(upload())
    assert "could not be uploaded" in line and line.endswith("the same command tries again")
    assert {*server.repositories["someone/net"].files} == {".gitattributes"}


def test_a_hub_that_is_silent_or_not_to_be_asked(server, upload):
    assert "while HF_HUB_OFFLINE is set" in failed(upload(HF_HUB_OFFLINE="1"))
    server.silent = True
    assert "did not answer within 1 s" in failed(upload(HF_HUB_ETAG_TIMEOUT="1"))
    server.silent = False
    assert "someone/net" not in server.repositories


NETWORK = "weights.networks.load_weights"


def test_private_and_gated(server, ask):
    """Each with no token, and gated with one that is not admitted."""
    place, known = "hf://someone/model", {"HF_TOKEN": "hf_stranger"}
    server.tokens["hf_stranger"] = ("stranger", "read")
    repository = server.repositories["someone/model"]
    repository.private = True
    code, line = ask(place, function=NETWORK)
    assert code == 2 and "no such repository, or it is private: log in" in line
    code, line = ask(place, function=NETWORK, **known)
    assert code == 2 and "or your token does not give access to it" in line
    repository.private, repository.gated = False, True
    for environment in ({}, known):
        code, line = ask(place, function=NETWORK, **environment)
        assert code == 2 and f"gated; accept its terms at {server.endpoint}/someone/model" in line


def test_the_file_of_a_repository(server, ask):
    """The rule holds for what the hub has, and without a network for what the cache has."""
    model = server.repositories["someone/model"]
    function = "weights.picking.resolve"
    code, found = ask("hf://someone/model", function=function)
    assert (code, found) == (0, f"hf://someone/model@{model.refs['main']}/weights.pt")
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask("hf://someone/model", function=function, **offline) == (0, found)
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask("hf://someone/model", function=function, **nobody) == (0, found)
    model.commit({"a.pt": b"a", "b.pt": b"b"})
    code, line = ask("hf://someone/model", function=function)
    assert code == 2 and "but a.pt, b.pt; append one, as in hf://someone/model/a.pt" in line
    code, line = ask("hf://someone/vae@v2", function=function)
    assert code == 2 and "the repository someone/vae has no revision v2" in line
    code, line = ask("hf://someone/vae", function=function, **offline)
    assert code == 2 and "is not in the cache and the hub cannot be reached" in line
