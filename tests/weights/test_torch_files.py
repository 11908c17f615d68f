import json
import pickle
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import torch_files

torch = pytest.importorskip("torch")
ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([2**40, -1]),
    "half": np.array([0.5, 1.5], np.float16),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_there_and_back(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    torch_files.write_arrays(path, ARRAYS)
    back = torch_files.read_arrays(path)
    assert set(back) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "plain").touch()  # who may read it is the user's choice alone
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_pytorch_reads_what_is_written(tmp_path):
    torch_files.write_arrays(tmp_path / "w.pt", ARRAYS)
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    assert state["a.weight"].dtype == torch.float32 and state["b"].dtype == torch.int64
    np.testing.assert_array_equal(state["a.weight"].numpy(), ARRAYS["a.weight"])


@pytest.mark.parametrize(
    "around",
    [
        lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}},
        lambda state: {
            "model": {name: 0 * t for name, t in state.items()},
            "ema": state,
            "opt": {},
        },
        lambda state: {"module": state, "ds_version": "0.15"},
        lambda state: {f"module._orig_mod.{name}": t for name, t in state.items()},
    ],
)
def test_what_training_programs_put_around_weights(around, tmp_path):
    state = {"a.weight": torch.ones(2), "model.b": torch.arange(3.0)}
    torch.save(around(state), tmp_path / "w.pt")
    found = torch_files.read_arrays(tmp_path / "w.pt")
    assert list(found) == list(state)
    assert found["model.b"].tolist() == [0, 1, 2] and found["a.weight"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "around",
    [
        lambda name: f"module.{name}",  # torch.optim.swa_utils.AveragedModel
        lambda name: f"module.model._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}".replace("blocks.", "blocks._orig_mod."),
        lambda name: name.replace("blocks.", "blocks._checkpoint_wrapped_module."),
    ],
)
def test_prefixes_and_counters(around, tmp_path):
    names = [f"blocks.{number}.weight" for number in range(9)]
    state = {around(name): torch.ones(2) for name in names}
    extra = {"n_averaged": torch.tensor(7), around("norm.num_batches_tracked"): torch.tensor(7)}
    torch.save({**extra, **state}, tmp_path / "w.pt")
    file = torch_files.read_file(tmp_path / "w.pt")
    assert list(file.arrays) == names and file.ignored == tuple(extra)
    # One array more, which no network has: it is still there, for a message.
    torch.save({**state, "epoch": torch.tensor(7)}, tmp_path / "w.pt")
    assert list(torch_files.read_file(tmp_path / "w.pt").arrays) == [*names, "epoch"]


def test_prefixes_that_stay(tmp_path):
    """Those of a part of the names, and where two names would become one."""
    for names in (["model.a", "model.b", "first.a"], [*(f"model.{n}" for n in range(9)), "8"]):
        torch.save({name: torch.ones(2) for name in names}, tmp_path / "w.pt")
        assert list(torch_files.read_file(tmp_path / "w.pt").arrays) == names


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64", "float32"])
def test_the_type_of_the_floats_is_told(name, suffix, tmp_path):
    array = np.array([0.5, 1.5], getattr(ml_dtypes, name, name))
    path = tmp_path / f"w{suffix}"
    state = {"a": array, "b": np.ones(2, np.float32), "c": np.arange(2)}
    if suffix == ".pt":
        tensor = torch.tensor([0.5, 1.5], dtype=getattr(torch, name))
        torch.save({"a": tensor, "b": torch.ones(2), "c": torch.arange(2)}, path)
    else:
        torch_files.write_arrays(path, state)
    file = torch_files.read_file(path)
    assert file.dtype == (None if name == "float32" else name)
    assert all(file.arrays[key].dtype == array.dtype for key, array in state.items())
    np.testing.assert_array_equal(file.arrays["a"].astype(np.float32), [0.5, 1.5])


def test_float8_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(2)
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="w.safetensors has tensors of float8_e4m3fn, which are"):
        torch_files.read_file(tmp_path / "w.safetensors")


def test_safetensors_need_no_pytorch(tmp_path):
    """In a process where importing it fails."""
    code = f"""
import sys
sys.modules["torch"] = None
import ml_dtypes, numpy as np
from mdt_jax.weights import torch_files
path = {str(tmp_path / "w.safetensors")!r}
torch_files.write_arrays(path, {{"a": np.ones(3, ml_dtypes.bfloat16)}}, ["cat"])
file = torch_files.read_file(path)
assert file.dtype == "bfloat16" and file.arrays["a"].tolist() == [1, 1, 1]
assert torch_files.read_classes(path) == ("cat",)
index = path + ".index.json"
open(index, "w").write('{{"weight_map": {{"a": "w.safetensors"}}}}')
assert torch_files.read_file(index).arrays["a"].tolist() == [1, 1, 1]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bfloat16_an_old_format_and_a_state_dict_within(tmp_path):
    content = {"state_dict": {"a": torch.ones(3, dtype=torch.bfloat16)}, "global_step": 3}
    for name, new in (("new.ckpt", True), ("old.ckpt", False)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new)
        (array,) = torch_files.read_arrays(tmp_path / name).values()
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.astype(np.float32), np.ones(3))


class Malicious:
    """Unpickling it freely would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("new", [True, False])
def test_nothing_in_a_malicious_file_runs(new, tmp_path):
    ran, file = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"a": torch.ones(2), "b": Malicious(ran)}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(
        UserError, match=r"evil.pt holds something other than tensors \(\w*\.?open\)"
    ) as error:
        torch_files.read_arrays(file)
    assert not ran.exists() and "\n" not in str(error.value)
    # The file does what it says when it is read carelessly.
    if new:
        with zipfile.ZipFile(file) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            with pytest.raises(pickle.UnpicklingError):
                pickle.loads(archive.read(name))
        torch.load(file, weights_only=False)["b"].close()
        assert ran.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("length", [0, 1, 100, -200])
def test_a_file_cut_short(suffix, length, tmp_path):
    path = tmp_path / f"cut{suffix}"
    torch_files.write_arrays(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:length])
    said = "damaged" if length else "empty; download"
    with pytest.raises(UserError, match=f"cut{suffix} is {said}") as error:
        torch_files.read_arrays(path)
    assert "\n" not in str(error.value)


def test_what_is_no_tensor_is_named(tmp_path):
    torch.save({"a": torch.ones(2), "lr": 0.1}, tmp_path / "lr.pt")
    with pytest.raises(UserError, match="lr.pt: 'lr' is a float, not a tensor by name"):
        torch_files.read_arrays(tmp_path / "lr.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list, not tensors by name"):
        torch_files.read_arrays(tmp_path / "list.pt")
    with pytest.raises(UserError, match="does not exist"):
        torch_files.read_arrays(tmp_path / "none.pt")
    (tmp_path / "w.npz").touch()
    with pytest.raises(UserError, match="unknown suffix '.npz'; use one of .pt"):
        torch_files.read_arrays(tmp_path / "w.npz")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        torch_files.write_arrays(tmp_path / "w.pt", {"a": np.array(["text"])})
    assert list(tmp_path.iterdir()) == []


WHAT = {
    "bytes.pt": (b"\x80", "damaged, cut short or no file of weights"),
    "words.pt": (b"hello", "a text file, not weights"),
    "README.pt": ("# Masked Diffusion – größer\n\n*weights*".encode(), "a text file, not weights"),
    "long.safetensors": ("é".encode() * 300, "a text file, not weights"),
    "page.pt": (b"\n<!DOCTYPE html><html>", "a text file, a page of HTML; download"),
    "page.safetensors": (b"<html><head>", "a text file, a page of HTML; download"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
                        "a text file, the pointer of Git LFS .* git lfs pull"),
    "w.gguf": (b"GGUF\3\0\0\0" + bytes(16), "a GGUF file, for llama.cpp; take the .safetensors"),
    "gguf.safetensors": (b"GGUF\3\0\0\0" + bytes(16), "a GGUF file"),
    "w.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(9), "an ONNX graph; take the"),
    "onnx.pt": (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(9), "an ONNX graph"),
    "keras.bin": (b"\x89HDF\r\n\x1a\n" + bytes(16), "an HDF5 file"),
    "config.json": (b'{"hidden_size": 1152}', "a text file"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHAT)
def test_what_is_no_file_of_weights(name, tmp_path):
    content, what = WHAT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/{name} is {what}") as error:
        torch_files.read_file(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_file_under_the_suffix_of_the_other_format(tmp_path):
    torch_files.write_arrays(tmp_path / "a.pt", ARRAYS)
    (tmp_path / "a.pt").rename(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="b.safetensors is a zip, .* rename it to .pt"):
        torch_files.read_file(tmp_path / "b.safetensors")
    torch_files.write_arrays(tmp_path / "a.safetensors", ARRAYS)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.pt")
    with pytest.raises(UserError, match="b.pt is a safetensors file; rename it"):
        torch_files.read_file(tmp_path / "b.pt")


@pytest.mark.parametrize("new", [True, False])
def test_a_byte_that_is_wrong_is_no_traceback(new, tmp_path):
    """In a zipped file, whose parts have checksums, it changes no number either."""
    whole, path = tmp_path / "whole.pt", tmp_path / "flipped.pt"
    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save(tensors, whole, _use_new_zipfile_serialization=new)
    content = whole.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 0x55
        path.write_bytes(flipped)
        try:
            found = torch_files.read_arrays(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert not new or all((found[name] == ARRAYS[name]).all() for name in ARRAYS), place


def test_a_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "w.pt"
    torch_files.write_arrays(path, ARRAYS)
    content = bytearray(path.read_bytes())
    content[content.index(ARRAYS["a.weight"].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w.pt is damaged: \S+ in it does not have its checksum"):
        torch_files.read_arrays(path)


def test_a_pytorch_that_runs_what_is_in_files_is_refused(tmp_path, monkeypatch):
    torch_files.write_arrays(tmp_path / "w.pt", ARRAYS)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.5.1+cu124")
    with pytest.raises(UserError, match=r"PyTorch 2.5.1\+cu124 can run code .* 'torch>=2.6'"):
        torch_files.read_arrays(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.ones(2).to(torch.float8_e4m3fn), "a is a tensor of float8_e4m3fn, strided"),
        (torch.ones(2).to_sparse(), "a is a tensor of float32, sparse_coo"),
        (torch.ones(2, dtype=torch.complex64), "a is of type complex64"),
        (torch.ones(2, dtype=torch.bool), "a is of type bool"),
    ],
)
def test_tensors_that_are_no_weights(value, message, tmp_path):
    torch.save({"a": value}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=message):
        torch_files.read_arrays(tmp_path / "odd.pt")


def test_names_that_are_no_text(tmp_path):
    torch.save({0: torch.ones(2)}, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match="not a tensor by name"):
        torch_files.read_arrays(tmp_path / "numbers.pt")


def test_a_neighbour_of_a_similar_name_stays(tmp_path):
    (tmp_path / "w.pt.tmp").write_text("another's")
    torch_files.write_arrays(tmp_path / "w.pt", ARRAYS)
    assert (tmp_path / "w.pt.tmp").read_text() == "another's"
