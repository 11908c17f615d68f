"""The shards of an index on the hub are downloaded one after the other."""

import json
import os
import subprocess
import sys

import pytest

from mdt_jax.weights import torch_files
from mdt_jax.weights.kinds import params_sha256
from tests.conftest import ROOT
from tests.hub_server import serve
from tests.published import published_params, published_state

pytest.importorskip("huggingface_hub")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def served(tmp_path):
    """The server's content."""
    state = published_state("v1_state")
    where = {name: SHARDS[number % 2] for number, name in enumerate(state)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for shard in SHARDS:
        held = {name: array for name, array in state.items() if where[name] == shard}
        torch_files.write_arrays(tmp_path / shard, held)
    place = "/someone/model/resolve/main"
    return {f"{place}/{name}": (tmp_path / name).read_bytes() for name in (INDEX, *SHARDS)}


def load(files, folder):
    """(the hash or the error that a process printed that loads it, the files that it fetched)."""
    code = (
        "import sys; from mdt_jax import cli\n"
        "from mdt_jax.weights.kinds import params_sha256\n"
        "from mdt_jax.weights.networks import load_weights\n"
        f"cli.run(lambda _: print(params_sha256(load_weights('hf://someone/model/{INDEX}').params)))\n"
        "print('torch' in sys.modules)"
    )
    with serve(files) as server:
        hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "cache")}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | hub, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        gets = [path for path in server.requests if path.startswith("GET /someone/model/resolve/")]
        asked = [path.rpartition("/")[2] for path in gets]
    return run.stdout, asked


def test_shards_on_the_hub(served, tmp_path):
    printed, asked = load(served, tmp_path)
    assert printed == params_sha256(published_params("v1_state")) + "\nFalse\n"
    assert asked == [INDEX, *SHARDS]


def test_a_shard_that_is_not_there(served, tmp_path):
    del served[f"/someone/model/resolve/main/{SHARDS[1]}"]
    printed, _ = load(served, tmp_path)
    told = f"/{SHARDS[1]}: the repository someone/model has no such file"
    assert printed.count("\n") == 1 and told in printed
    assert printed.startswith(f"error: hf://someone/model/{INDEX}: ")
