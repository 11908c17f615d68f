"""PyTorch's weight files and safetensors as NumPy arrays, read without running their code."""

import importlib.metadata
import json
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import as_path, atomic_write, reason

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*PICKLED, ".safetensors")
SAFE_TORCH = (2, 6)  # the first version whose weights_only=True never runs code of the file
# Keys under which training programs keep weights beside optimiser states; averages first.
HOLDERS = ("ema", "model_ema", "state_dict", "model", "module")
# Prefixes that DistributedDataParallel, torch.compile and Lightning put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
# The names of classes, as JSON: a key in the metadata of a .safetensors, an entry of a .pt's zip.
CLASSES = "classes"


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in its order.

    The tensors may be in {"state_dict": …} or another of HOLDERS; an average of the weights comes
    first. PREFIXES that all names share are removed.

    Raises UserError, naming the file, where it is damaged, holds anything but tensors of integers
    or floats, or its pickle needs more than tensors, which is never run.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    arrays = (_read_safetensors if path.suffix == ".safetensors" else _read_pickled)(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
            raise UserError(
                f"{path}: {name} is of type {array.dtype}; weights must be integers or floats"
            )
    return _without_prefixes(arrays)


def _without_prefixes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by name, without those of PREFIXES, also several in turn, that all names have."""
    for prefix in PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            shorter = {name.removeprefix(prefix): array for name, array in arrays.items()}
            return _without_prefixes(shorter)
    return arrays


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # of several kinds
        raise UserError(
            f"{path} is damaged or no safetensors file that NumPy can hold: {reason(error)}"
        ) from None


def _torch() -> Any:
    """PyTorch; UserError where it is not installed, or so old that files can run code in it."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{PICKLED[0]} files need PyTorch: pip install -e '.[weights]'") from None
    if tuple(map(int, version.split(".")[:2])) < SAFE_TORCH:
        needed = ".".join(map(str, SAFE_TORCH))
        raise UserError(
            f"PyTorch {version} can run code from a file of weights (CVE-2025-32434): install "
            f"{needed} or newer, pip install 'torch>={needed}'"
        )
    import torch

    return torch


def _check_sums(path: pathlib.Path) -> None:
    """Raise UserError where a part of a zipped file does not match its checksum.

    PyTorch itself does not check.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of many kinds
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
            # Mapped tensors are read on use; only the newer, zipped format can be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of any kind, for bytes that are no pickle
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise UserError(
                f"{path} holds something other than tensors ({forbidden[1]}) and was not read"
            ) from None
        why = "" if isinstance(error, pickle.UnpicklingError) else f": {reason(error)}"
        raise UserError(f"{path} is damaged, cut short or no file of weights{why}") from None
    if isinstance(content, Mapping):
        values = (content.get(name) for name in HOLDERS)
        content = next((value for value in values if isinstance(value, Mapping)), content)
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
    if tensor.dtype == torch.bfloat16:  # a type that NumPy lacks
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """The names of classes that `write_arrays` put into a file of weights; () without any."""
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
    except (ValueError, RecursionError):  # another program's entry of that name
        return ()
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return tuple(classes) if named else ()


def _classes_entry(archive: zipfile.ZipFile) -> str:
    """The entry of the names, in the one folder in which PyTorch requires all entries."""
    return f"{archive.namelist()[0].partition('/')[0]}/{CLASSES}"


def write_arrays(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], classes: Sequence[str] = ()
) -> None:
    """Write arrays by name in the format of the suffix; whole or not at all.

    classes: their names, which PyTorch and safetensors ignore. Raises UserError where the file
    cannot be written, for example on a full disk.
    """
    path = as_path(path)
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
