"""PyTorch's own files, .pt and others: what they hold, read without running their code."""

import importlib.metadata
import pathlib
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason
from mdt_jax.weights import foreign

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFE_TORCH = (2, 6)  # the first version whose weights_only=True never runs code of the file


class Inert:
    """Stands for an object of a file that is no tensor: takes any arguments, and keeps nothing."""

    def __new__(cls, *_):
        return object.__new__(cls)

    def __setstate__(self, state):
        pass


class Namespace(Inert):
    """Stands for an argparse.Namespace. values: its fields that are text, numbers or None."""

    values: Mapping[str, Any] = types.MappingProxyType({})

    def __setstate__(self, state):
        self.values = plain(state)


def plain(state: Any) -> dict[str, Any]:
    """The entries of a dict whose names are text and whose values are text, numbers or None."""
    if not isinstance(state, dict):
        return {}
    kinds = (str, int, float, bool, type(None))
    return {n: v for n, v in state.items() if type(n) is str and type(v) in kinds}


def _stand_ins() -> list[tuple[Any, str]]:
    """(class, name) of what a checkpoint may hold beside tensors: the unpickler makes this class
    where the pickle names that one.

    None of the named classes and functions is ever imported or called: what the pickle makes in
    their place is `Inert`, `Namespace` or an empty dict. A list of names, since what else a pickle
    names is the sign of a file that is no checkpoint, or of an attack.
    """
    numpy = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
             for name in ("scalar", "_reconstruct")]  # fmt: skip
    paths = [f"pathlib{inner}.{flavour}Path" for inner in ("", "._local")
             for flavour in ("Posix", "PurePosix", "Windows", "PureWindows")]  # fmt: skip
    callback = "callbacks.model_checkpoint.ModelCheckpoint"  # a key, in Stable Diffusion's files
    inert = [*numpy, "numpy.dtype", "numpy.ndarray", *paths, f"pytorch_lightning.{callback}"]
    # Lightning's hyper parameters, a dict with attributes.
    dicts = ("pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data",
             "lightning.fabric.utilities.data")  # fmt: skip
    return [
        (Namespace, "argparse.Namespace"),
        *((type(name, (Inert,), {}), name) for name in inert),
        *((OrderedDict, f"{module}.AttributeDict") for module in dicts),
    ]


def torch_module() -> Any:
    """PyTorch; UserError where it is not installed, or so old that files can run code in it."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{SUFFIXES[0]} files need PyTorch: pip install -e '.[weights]'") from None
    if tuple(map(int, version.split(".")[:2])) < SAFE_TORCH:
        needed = ".".join(map(str, SAFE_TORCH))
        raise UserError(
            f"PyTorch {version} can run code from a file of weights (CVE-2025-32434): install "
            f"{needed} or newer, pip install 'torch>={needed}'"
        )
    import torch

    return torch


def is_zipped(path: pathlib.Path) -> bool:
    """Whether a file is a zip, as PyTorch writes since 1.6; also a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


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


def read(path: pathlib.Path) -> Any:
    """What a file holds: tensors of PyTorch in dicts and lists, with stand-ins for other objects.

    Raises UserError, naming the file, where it is damaged or no such file, and where its pickle
    names something that is not known to be harmless.
    """
    torch, zipped = torch_module(), is_zipped(path)
    if zipped:
        _check_sums(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins()):
            warnings.simplefilter("ignore")
            # Mapped tensors are read on use; only the newer, zipped format can be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of any kind, for bytes that are no pickle
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise UserError(
                f"{path} holds something other than tensors ({forbidden[1][:80]}) and was not read"
            ) from None
        if what := foreign.from_bytes(path, path.suffix):
            raise UserError(f"{path} is {what}") from None
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a program of TorchScript, which is not run; save its state_dict"
            ) from None
        # PyTorch's own words may advise to run the code in the file.
        why = f": {reason(error)}" if isinstance(error, OSError) else ""
        raise UserError(
            f"{path} is damaged, cut short or no file of weights{why}; {foreign.AGAIN}"
        ) from None


def to_array(tensor: Any) -> np.ndarray:
    """A tensor as an array in the same memory. Raises TypeError or RuntimeError where NumPy has no
    such array.
    """
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # a type that NumPy lacks
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
