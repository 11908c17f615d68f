"""PyTorch's weight files and safetensors as NumPy arrays, read without running what is in them."""

import importlib.metadata
import json
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, reason

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*PICKLED, ".safetensors")
SAFE_TORCH = (2, 6)  # the first whose weights_only=True runs nothing, whatever the file is
# What training programs keep weights under, beside optimisers and the like; the average first.
HOLDERS = ("ema", "model_ema", "state_dict", "model", "module")
# What DistributedDataParallel, torch.compile and Lightning begin every name with.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Of the names of classes, as JSON: a key of the metadata of a .safetensors, an entry of a .pt.
CLASSES = "classes"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in its order.

    A {"state_dict": …} or another of HOLDERS around them is taken off, and so are PREFIXES that all
    names have. Where a file has an average of the weights, too, this is what is read.

    Raises UserError, naming the file, where it is cut short, holds anything but tensors of whole or
    floating numbers, or asks for more than tensors to be unpickled: nothing of that is run.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    arrays = (_read_safetensors if path.suffix == ".safetensors" else _read_pickled)(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
            raise UserError(f"{path}: {name} is of type {array.dtype}, not of numbers for weights")
    while arrays and (prefix := next((p for p in PREFIXES if _all_begin(arrays, p)), "")):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _all_begin(names: Collection[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # of several kinds, by what is wrong with the file
        message = f"{path} is damaged or no safetensors file NumPy can hold: {reason(error)}"
        raise UserError(message) from None


def _torch() -> Any:
    """PyTorch; UserError where it is not installed, or so old that what it reads can run code."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{PICKLED[0]} files need PyTorch: pip install -e '.[weights]'") from None
    if tuple(map(int, version.split(".")[:2])) < SAFE_TORCH:
        needed = ".".join(map(str, SAFE_TORCH))
        raise UserError(
            f"PyTorch {version} can run code that a file of weights holds (CVE-2025-32434): "
            f"install {needed} or newer, pip install 'torch>={needed}'"
        )
    import torch

    return torch


def _check_sums(path: pathlib.Path) -> None:
    """Raise UserError where a part of a zipped file is not what its checksum says.

    PyTorch itself does not look at them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of many kinds, by what is damaged
        raise UserError(f"{path} is damaged or cut short: {reason(error)}") from None
    if damaged is not None:
        raise UserError(f"{path} is damaged: {damaged} in it does not have its checksum")


def _read_pickled(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch, zipped = _torch(), zipfile.is_zipfile(path)
    if zipped:
        _check_sums(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped, tensors are read when they are used; only the newer, zipped format can be.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever the unpickler makes of bytes that are no pickle
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UserError(
                f"{path} holds something other than tensors ({asked[1]}) and was not read"
            ) from None
        why = "" if isinstance(error, pickle.UnpicklingError) else f": {reason(error)}"
        raise UserError(f"{path} is damaged, cut short or no file of weights{why}") from None
    if isinstance(content, Mapping):
        inside = (content.get(name) for name in HOLDERS)
        content = next((held for held in inside if isinstance(held, Mapping)), content)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    arrays = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor by name")
        try:
            arrays[name] = _array(torch, value)
        except (TypeError, RuntimeError):
            kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise UserError(f"{path}: {name} is a tensor of {kind}, which is not read") from None
    return arrays


def _array(torch, tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy itself has none
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_torch(array: np.ndarray) -> np.ndarray:
    """PyTorch's layout → Flax's: [out, in, h, w] → [h, w, in, out], [out, in] → [in, out]."""
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim))


def to_torch(array: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`."""
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim))


def check_names(expected: Collection[str], found: Collection[str], what: str) -> None:
    """Raise UserError, with the first missing and unexpected names, where they are not the same."""
    said, known, there = [], set(expected), set(found)
    for kind, names in (
        ("missing", [name for name in expected if name not in there]),
        ("unexpected", [name for name in found if name not in known]),
    ):
        if names:
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            first = ", ".join(name[:80] for name in names[:3])
            said.append(f"{kind} {' '.join(first.split())}{more}")
    if said:
        raise UserError(f"these are not the weights of {what}: {'; '.join(said)}")


def read_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """The names of classes that `write` left in a file of weights; none where there are none."""
    if pathlib.Path(path).suffix == ".safetensors":
        import safetensors

        with safetensors.safe_open(path, framework="numpy") as file:
            note = (file.metadata() or {}).get(CLASSES, "null")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entry = _classes_entry(archive)
            note = archive.read(entry) if entry in archive.namelist() else "null"
    else:
        return ()
    try:
        classes = json.loads(note)
    except (ValueError, RecursionError):  # somebody else's note of that name
        return ()
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return tuple(classes) if named else ()


def _classes_entry(archive: zipfile.ZipFile) -> str:
    """PyTorch wants all entries in one folder."""
    return f"{archive.namelist()[0].partition('/')[0]}/{CLASSES}"


def write(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], classes: Sequence[str] = ()
) -> None:
    """Write arrays by name in the format of the suffix; whole or not at all.

    classes: their names, which PyTorch and safetensors pass over. Raises UserError where it cannot
    be written, such as on a full disk.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        import safetensors.numpy

        with atomic_write(path, (safetensors.SafetensorError,)) as temporary:
            note = {CLASSES: json.dumps(classes)} if classes else None
            safetensors.numpy.save_file(dict(arrays), temporary, metadata=note)
    else:
        torch = _torch()
        tensors = {
            name: torch.from_numpy(np.require(a, None, ["C", "W"])) for name, a in arrays.items()
        }
        with atomic_write(path, (RuntimeError,)) as temporary:
            torch.save(tensors, temporary)
            if classes:
                with zipfile.ZipFile(temporary, "a") as archive:
                    archive.writestr(_classes_entry(archive), json.dumps(classes))
