"""A network in several files of safetensors, and the index that lists them."""

import json

import numpy as np
import pytest

from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import torch_files

ARRAYS = {f"blocks.{n}.weight": np.full((2, 3), n, np.float32) for n in range(5)}
SHARDS = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
WHERE = {name: SHARDS[n % 3] for n, name in enumerate(ARRAYS)}


@pytest.fixture
def index(tmp_path):
    """The index; its shards are beside it."""
    for shard in SHARDS:
        held = {f"module.{name}": ARRAYS[name] for name in ARRAYS if WHERE[name] == shard}
        torch_files.write_arrays(tmp_path / shard, held)
    return write(tmp_path, {f"module.{name}": shard for name, shard in WHERE.items()})


def write(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 120}, "weight_map": weight_map}))
    return path


def test_the_shards_of_an_index(index, tmp_path):
    file = torch_files.read_file(index)
    assert list(file.arrays) == list(ARRAYS) and (file.ignored, file.dtype) == ((), None)
    assert all((file.arrays[name] == array).all() for name, array in ARRAYS.items())


def test_shards_may_be_elsewhere(index, tmp_path):
    (tmp_path / "there").mkdir()
    for shard in SHARDS:
        (tmp_path / shard).rename(tmp_path / "there" / shard)
    asked = []

    def sibling(name):
        asked.append(name)
        return tmp_path / "there" / name

    file = torch_files.read_file(index, sibling)
    assert list(file.arrays) == list(ARRAYS) and asked == SHARDS  # each once


def test_what_an_index_does_not_list_is_ignored(index, tmp_path):
    listed = json.loads(index.read_text())["weight_map"]
    write(tmp_path, {name: shard for name, shard in listed.items() if "4" not in name})
    file = torch_files.read_file(index)
    assert len(file.arrays) == 4 and file.ignored == ("module.blocks.4.weight",)


BAD = {
    "no index": ({"a": 1}, "is no index of shards: it needs a weight_map"),
    "a list": ([], "expected a JSON object"),
    "nothing": ({"weight_map": {}}, "is no index of shards"),
    "pairs": ({"weight_map": [["a", "b"]]}, "is no index of shards"),
    "a number": ({"weight_map": {"a": 1}}, "names the shard '1'; a shard is a .safetensors in the"),
    "above": ({"weight_map": {"a": "../x.safetensors"}}, r"the shard '\.\./x.safetensors'"),
    "absolute": ({"weight_map": {"a": "/x.safetensors"}}, "the shard '/x.safetensors'"),
    "inside": ({"weight_map": {"a": "b/x.safetensors"}}, "the shard 'b/x.safetensors'"),
    "drive": ({"weight_map": {"a": "c:x.safetensors"}}, "the shard 'c:x.safetensors'"),
    "hidden": ({"weight_map": {"a": "..safetensors"}}, r"the shard '\.\.safetensors'"),
    "null": ({"weight_map": {"a": "a\0.safetensors"}}, "the shard 'a"),
    "pickled": ({"weight_map": {"a": "x.pt"}}, "the shard 'x.pt'; a shard is a .safetensors"),
    "itself": ({"weight_map": {"a": "model.safetensors.index.json"}}, "the shard 'model"),
    "missing": ({"weight_map": {"a": "x.safetensors"}},
                "the shard x.safetensors, which does not exist: .*/x.safetensors"),
    "broken promise": ({"weight_map": {"a": SHARDS[0]}},
                       f"{SHARDS[0]} lacks a, which model.safetensors.index.json lists as in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_index(name, index):
    content, said = BAD[name]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        torch_files.read_file(index)
    assert str(error.value).startswith(str(index.parent)) and "\n" not in str(error.value)


def test_an_index_that_is_no_json(index):
    index.write_text("weight_map")
    with pytest.raises(UserError, match="index.json cannot be read: Expecting value"):
        torch_files.read_file(index)


def test_a_damaged_shard(index, tmp_path):
    content = (tmp_path / SHARDS[1]).read_bytes()
    (tmp_path / SHARDS[1]).write_bytes(content[:-3])
    with pytest.raises(UserError, match=f"{SHARDS[1]} is damaged"):
        torch_files.read_file(index)
