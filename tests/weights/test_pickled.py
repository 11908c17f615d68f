"""Training checkpoints are read for their tensors, and nothing that a pickle names is run."""

import argparse
import collections
import contextlib
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest

from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import torch_files

torch = pytest.importorskip("torch")
STATE = {"a.weight": torch.ones(2), "b": torch.arange(3.0)}
FORMATS = (True, False)  # zipped, and as before PyTorch 1.6


def read(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return torch_files.read_file(path)


def same(arrays, state):
    return list(arrays) == list(state) and all((arrays[n] == state[n].numpy()).all() for n in state)


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_training_checkpoint(zipped, tmp_path):
    """As train.py of facebookresearch/DiT saves it, after a step of the optimiser."""
    network = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(4)).sum().backward()
    optimizer.step()
    average = {name: tensor / 2 for name, tensor in network.state_dict().items()}
    flags = {"model": "SiT-XL/2", "path_type": "Linear", "epochs": 1400, "lr": 1e-4, "cfg": None,
             "results": pathlib.Path("results"), "betas": (0.9, 0.999), "ema": True}  # fmt: skip
    content = {"model": network.state_dict(), "ema": average, "opt": optimizer.state_dict(),
               "args": argparse.Namespace(**flags)}  # fmt: skip
    file = read(content, tmp_path / "0400000.pt", zipped)
    assert same(file.arrays, average)
    assert (file.part, file.others, file.item) == ("ema", ("model", "opt", "args"), "ema")
    assert file.choice and file.dtype is None and file.ignored == ()
    del flags["results"], flags["betas"]
    assert file.args == flags
    raw = torch_files.read_file(tmp_path / "0400000.pt", raw=True)
    assert same(raw.arrays, network.state_dict()) and (raw.part, raw.item) == ("model", "raw")
    only = read({"ema": average, "args": flags}, tmp_path / "ema.pt", zipped)
    assert not only.choice and only.item == "ema" and only.args == flags
    raw = torch_files.read_file(tmp_path / "ema.pt", raw=True)
    assert raw.part == "ema"  # it has no other weights


def a_module(name, monkeypatch, **members):
    """A module of a package that is not installed; what it has pickles as of there."""
    package, *rest = name.split(".")
    for inner in (package, *(f"{package}.{'.'.join(rest[: n + 1])}" for n in range(len(rest)))):
        monkeypatch.setitem(sys.modules, inner, types.ModuleType(inner))
    for member in members.values():
        member.__module__ = name
    vars(sys.modules[name]).update(members)


BESIDE = {
    "scalar": np.float64(0.5),
    "array": np.arange(6.0).reshape(2, 3),
    "bytes": np.array([b"ab"]),
    "type": np.dtype(">i4"),
    "path": pathlib.Path("runs/1"),
    "pure": pathlib.PureWindowsPath("runs"),
    "namespace": argparse.Namespace(inner=argparse.Namespace(x=1), path=pathlib.Path("a")),
    "ordered": collections.OrderedDict(a=collections.Counter("ab")),
    "of PyTorch": [torch.Size([1]), torch.float16, torch.device("cpu"), torch.ones(2, 2)],
    "random": np.random.RandomState(0).get_state(),
    "plain": {"set": {1}, "complex": 1j, "bytes": b"ab", "big": 2**80, "none": None},
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("zipped", FORMATS)
def test_what_is_beside_the_weights(name, zipped, tmp_path):
    file = read({"state_dict": STATE, "hyper": BESIDE[name]}, tmp_path / "w.ckpt", zipped)
    assert same(file.arrays, STATE) and (file.part, file.others) == ("state_dict", ("hyper",))
    assert not file.choice and file.item is None


def test_names_of_both_versions_of_numpy(tmp_path):
    content = {"state_dict": STATE, "a": np.float64(1), "b": np.ones(3)}
    torch.save(content, tmp_path / "new.pt", _use_new_zipfile_serialization=False)
    saved = (tmp_path / "new.pt").read_bytes()
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    own, other = names if names[0] in saved else names[::-1]
    (tmp_path / "old.pt").write_bytes(saved.replace(own, other))
    assert saved.count(own) == 2
    for file in ("new.pt", "old.pt"):
        assert same(torch_files.read_file(tmp_path / file).arrays, STATE)


def test_the_hyper_parameters_of_lightning(tmp_path, monkeypatch):
    names = ("pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data")
    for name in names:
        attributes = type("AttributeDict", (dict,), {})
        a_module(name, monkeypatch, AttributeDict=attributes)
        checkpoint = type("ModelCheckpoint", (), {})
        callbacks = "pytorch_lightning.callbacks.model_checkpoint"
        a_module(callbacks, monkeypatch, ModelCheckpoint=checkpoint)
        content = {
            "state_dict": {f"model.{key}": value for key, value in STATE.items()},
            "hyper_parameters": attributes(lr=np.float64(0.1), config=argparse.Namespace(x=1)),
            "callbacks": {checkpoint: {"best": torch.tensor(0.5)}},
        }
        file = read(content, tmp_path / "epoch.ckpt")
        assert same(file.arrays, STATE)
        assert file.others == ("hyper_parameters", "callbacks")


class Call:
    """Unpickling it freely would call a function; state: what it would give the result."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = function, arguments, *([] if state is None else [state])

    def __reduce__(self):
        return self.reduced


def touch(marker):
    return f"open({os.fspath(marker)!r}, 'w').close()"


EVIL = {
    "system": lambda marker: Call(os.system, f"touch {marker}"),
    "open": lambda marker: Call(open, str(marker), "w"),
    "exec": lambda marker: Call(exec, touch(marker)),
    "eval": lambda marker: Call(eval, touch(marker)),
    "process": lambda marker: Call(subprocess.Popen, ["touch", str(marker)]),
    "map": lambda marker: Call(map, os.system, [f"touch {marker}"]),
    "rebuilt": lambda marker: Call(
        torch._tensor._rebuild_from_type_v2, os.system, str, (f"touch {marker}",), None
    ),
    "in a namespace": lambda marker: argparse.Namespace(x=Call(os.system, f"touch {marker}")),
    "as an array": lambda marker: Call(
        np.ones(2).__reduce__()[0], Call(os.system, f"touch {marker}"), (0,), b"b"
    ),
}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("zipped", FORMATS)
def test_nothing_runs(name, zipped, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    content = {"ema": STATE, "args": EVIL[name](marker)}
    with pytest.raises(UserError, match=r"evil.pt holds something other than tensors \(\S+\) and"):
        read(content, path, zipped)
    assert not marker.exists()
    # The pickle does what it says when it is read carelessly.
    with contextlib.suppress(AttributeError, TypeError):  # from what is made of the result
        found = pickle.loads(pickle.dumps(content["args"]))
        list(found) if name == "map" else getattr(found, "wait", str)()
    assert marker.exists()


MAKE = argparse.Namespace
SCALAR, ARRAY = np.float64(1).__reduce__()[0], np.ones(2).__reduce__()[0]
HARMLESS = {
    "arguments": lambda: Call(SCALAR, 1, "x", None),
    "no arguments": lambda: Call(ARRAY),
    "objects": lambda: Call(ARRAY, object, (2**62,), b"O"),
    "a class": lambda: Call(MAKE, state={"__class__": dict, "__dict__": 1}),
    "slots": lambda: Call(MAKE, state=(None, {"__class__": MAKE, "values": 1, "__init__": 1})),
    "no dict": lambda: Call(MAKE, state=[1, 2]),
    "a tensor": lambda: Call(MAKE, state=torch.ones(2)),
    "other names": lambda: Call(MAKE, state={1: 2, ("a",): 3}),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_hostile_states_are_passed_over_or_refused(name, tmp_path):
    content = {"ema": STATE, "args": HARMLESS[name]()}
    try:
        file = read(content, tmp_path / "odd.pt")
    except UserError as error:
        assert "odd.pt holds something other than tensors" in str(error)
        assert name in ("objects", "a class")  # which name builtins
    else:
        assert same(file.arrays, STATE) and not file.args


@pytest.mark.parametrize(
    "inner, end",
    [(b"cargparse\nNamespace\n)\x81}X\1\0\0\0x", b"sb"), (b"}X\3\0\0\0ema", b"s"), (b"(", b"t")],
)
def test_deep_nesting(inner, end, tmp_path):
    depth = 20_000
    evil = b"\x80\x02" + inner * depth + b"N" + end * depth + b"."
    torch.save({"a": torch.ones(2)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "deep.pt", "w") as deep,
    ):
        for name in whole.namelist():
            deep.writestr(name, evil if name.endswith("data.pkl") else whole.read(name))
    said = r"deep.pt(: 'ema' is| holds) a \w+, not (a tensor|tensors) by name"
    with pytest.raises(UserError, match=said):
        torch_files.read_file(tmp_path / "deep.pt")


def test_a_wrapper_in_itself(tmp_path):
    content = {"ema": {}}
    content["ema"]["ema"] = content
    with pytest.raises(UserError, match="round.pt: 'ema' is a dict, not a tensor by name"):
        read(content, tmp_path / "round.pt")


def test_what_pytorch_advises_is_not_repeated(tmp_path):
    """Its errors for these two advise weights_only=False, which runs the code in a file."""
    (tmp_path / "zeros.pt").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="or no file of weights; download or copy it once more$"):
        torch_files.read_file(tmp_path / "zeros.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "jit.pt")
    with pytest.raises(UserError, match="jit.pt is a program of TorchScript, .* save its state"):
        torch_files.read_file(tmp_path / "jit.pt")


def test_wrappers_in_wrappers(tmp_path):
    file = read({"ema": {"module": STATE}, "model": {"module": STATE}}, tmp_path / "w.pt")
    assert same(file.arrays, STATE) and (file.part, file.item) == ("ema.module", "ema")
    file = read({"ema": None, "state_dict": STATE, "model": "DiT-S/2"}, tmp_path / "w.pt")
    assert same(file.arrays, STATE) and file.part == "state_dict"
    assert file.others == ("ema", "model") and not file.choice and file.item is None
    # A network whose own names are those of wrappers.
    file = read({"model": torch.ones(2, 2), "ema": torch.ones(3)}, tmp_path / "w.pt")
    assert set(file.arrays) == {"model", "ema"} and file.part is None


def test_weights_under_another_key_are_said_to_be_left_out(tmp_path):
    file = read({"model": STATE, "ema_of_mine": STATE, "opt": {"state": {}}}, tmp_path / "w.pt")
    assert file.choice and file.others == ("ema_of_mine", "opt")
    assert not read({"model": STATE, "opt": {"state": {}}}, tmp_path / "w.pt").choice


def test_what_is_no_tensor_has_the_name_of_its_class(tmp_path):
    with pytest.raises(UserError, match=r"w.pt: 'lr' is a numpy.*multiarray.scalar, not a tensor"):
        read({"ema": {**STATE, "lr": np.float64(1)}}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w.pt holds a Namespace, not tensors by name"):
        read(argparse.Namespace(x=1), tmp_path / "w.pt")
