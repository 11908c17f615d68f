"""PyTorch's weight files and safetensors as NumPy arrays, read without running their code."""

import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import as_path, atomic_write, read_json, reason
from mdt_jax.weights import foreign, pickled

SUFFIXES = (*pickled.SUFFIXES, ".safetensors")
INDEX = ".safetensors.index.json"  # the end of the name of an index of shards
# Keys under which training programs keep weights beside the state of the optimiser.
AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
HOLDERS = (*AVERAGES, "state_dict", "model", "module")
# Prefixes that DistributedDataParallel and Lightning put before every name.
PREFIXES = ("module.", "model.")
# What torch.compile, FSDP and activation checkpointing put before the names of what they wrap.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", re.ASCII
)
COUNTERS = ("n_averaged", "num_batches_tracked")  # of averaging and batch norm; no weights
# The names of classes, as JSON: a key in the metadata of a .safetensors, an entry of a .pt's zip.
CLASSES = "classes"


class File(NamedTuple):
    """What a file of weights holds.

    arrays: by name, in the order of the file. part: the key of the wrapper that they were under,
    and others: its other keys. choice: whether there were other weights, too. dtype: the types of
    floats other than float32. ignored: the names of arrays that were left out. args: the text and
    numbers under "args", the flags of the training.
    """

    arrays: dict[str, np.ndarray]
    part: str | None = None
    others: tuple[str, ...] = ()
    choice: bool = False
    dtype: str | None = None
    ignored: tuple[str, ...] = ()
    args: Mapping[str, Any] | None = None

    @property
    def item(self) -> str | None:
        """Which parameters of a training they are, "ema" or "raw"; None where unknown."""
        first = (self.part or "").partition(".")[0]
        return "ema" if first in AVERAGES else "raw" if self.choice else None


def is_weights(name: str) -> bool:
    """Whether a file of this name is one of weights, or an index of several."""
    return name.endswith((*SUFFIXES, INDEX))


def read_file(
    path: str | os.PathLike,
    sibling: Callable[[str], str | os.PathLike] | None = None,
    raw: bool = False,
) -> File:
    """The tensors of a file, or of the shards of an index (NAME.safetensors.index.json).

    They may be under one of HOLDERS: an average of the weights is taken first, or, where raw, last.
    What training programs add to all names is removed: PREFIXES and WRAPPERS.
    sibling: the local file of a shard's name; None means the file beside the index.
    Raises UserError, naming the file, where it is damaged, holds anything but tensors of integers
    or floats, or its pickle needs more than tensors, which is never run.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    if path.name.endswith(INDEX):
        file = _read_index(path, sibling or path.with_name)
    elif path.suffix == ".safetensors":
        file = File(_read_safetensors(path))
    elif path.suffix in SUFFIXES:
        file = _read_pickled(path, raw)
    else:
        what = foreign.from_bytes(path, path.suffix)
        known = f"unknown suffix {path.suffix!r}; use one of {', '.join((*SUFFIXES, INDEX))}"
        raise UserError(f"{path} is {what}" if what else f"{path}: {known}")
    floats = set()
    for name, array in file.arrays.items():
        kind, dtype = array.dtype.kind, array.dtype.name
        if kind not in "fiu" and dtype != "bfloat16":
            raise UserError(
                f"{path}: {name} is of type {dtype}; weights must be integers or floats"
            )
        floats |= {dtype} - {"float32"} if kind not in "iu" else set()
    counters = dict.fromkeys(n for n in file.arrays if n.rpartition(".")[2] in COUNTERS)
    arrays = {name: array for name, array in file.arrays.items() if name not in counters}
    return file._replace(
        arrays=_without_prefixes(arrays),
        dtype=", ".join(sorted(floats)) or None,
        ignored=(*file.ignored, *counters),
    )


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of `read_file`."""
    return read_file(path).arrays


def _without_prefixes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by name, without WRAPPERS and those of PREFIXES, also several in turn, that at least
    nine in ten names have. Where two names would become one, all stay as they are.
    """
    names = [WRAPPERS.sub("", name) for name in arrays]
    while prefix := next((p for p in PREFIXES if _nearly_all(names, p)), None):
        names = [name.removeprefix(prefix) for name in names]
    renamed = dict(zip(names, arrays.values(), strict=True))
    return renamed if len(renamed) == len(arrays) else arrays


def _nearly_all(names: list[str], prefix: str) -> bool:
    return bool(names) and sum(n.startswith(prefix) for n in names) >= 0.9 * len(names)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # of several kinds
        if what := foreign.from_bytes(path, path.suffix):
            raise UserError(f"{path} is {what}") from None
        if isinstance(error, AttributeError):  # numpy.float8_e4m3fn
            raise UserError(f"{path} has tensors of {error.name}, which are not read") from None
        raise UserError(
            f"{path} is damaged, cut short or no safetensors file: {reason(error)}; {foreign.AGAIN}"
        ) from None


def _read_index(path: pathlib.Path, sibling: Callable[[str], str | os.PathLike]) -> File:
    """The tensors that an index lists, shard after shard.

    What the shards hold besides is ignored: the list says what the checkpoint is.
    """
    shards = (read_json(path) or {}).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path} is no index of shards: it needs a weight_map of tensors and files")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.+-]*\.safetensors", shard, re.A):
            raise UserError(
                f"{path} names the shard {str(shard)[:100]!r}; a shard is a .safetensors in the "
                "folder of the index"
            )
    arrays, ignored = {}, []
    for shard in dict.fromkeys(shards.values()):
        file = pathlib.Path(sibling(shard))
        if not os.path.isfile(file):
            raise UserError(f"{path} names the shard {shard}, which does not exist: {file}")
        held = _read_safetensors(file)
        promised = [name for name, its in shards.items() if its == shard]
        missing = [name for name in promised if name not in held]
        if missing:
            raise UserError(f"{file} lacks {missing[0][:80]}, which {path.name} lists as in it")
        arrays |= {name: held.pop(name) for name in promised}
        ignored += held
    return File({name: arrays[name] for name in shards}, ignored=tuple(ignored))


def _read_pickled(path: pathlib.Path, raw: bool) -> File:
    content = pickled.read(path)
    file, part = File({}), []
    if isinstance(content, Mapping):
        args = content.get("args")
        args = args.values if isinstance(args, pickled.Namespace) else pickled.plain(args)
        file = file._replace(args=args or None)
    for _ in range(2):  # {"ema": {"module": …}}
        inner = {n: content.get(n) for n in HOLDERS} if isinstance(content, Mapping) else {}
        held = [name for name, value in inner.items() if isinstance(value, Mapping) and value]
        if not held:
            break
        chosen = next((name for name in held if raw and name not in AVERAGES), held[0])
        if not part:
            others = tuple(n for n in content if isinstance(n, str) and n != chosen)
            choice = len(held) > 1 or any(_has_tensors(content[name]) for name in others)
            file = file._replace(others=others, choice=choice)
        part.append(chosen)
        content = content[chosen]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return file._replace(arrays=_arrays_of(path, content), part=".".join(part) or None)


def _has_tensors(value: Any) -> bool:
    """Whether a value is a dict of tensors by name, perhaps other weights."""
    import torch

    tensors = value.values() if isinstance(value, Mapping) else ()
    return bool(tensors) and all(isinstance(tensor, torch.Tensor) for tensor in tensors)


def _arrays_of(path: pathlib.Path, tensors: Mapping) -> dict[str, np.ndarray]:
    """Tensors of PyTorch as arrays."""
    import torch

    arrays = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            name = (
                repr(name[:80]) if isinstance(name, str) else f"a key of type {type(name).__name__}"
            )
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor by name")
        try:
            arrays[name] = pickled.to_array(value)
        except (TypeError, RuntimeError):
            kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise UserError(f"{path}: {name} is a tensor of {kind}, which is not read") from None
    return arrays


def read_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """The names of classes that `write_arrays` put into a file of weights; () without any."""
    if pathlib.Path(path).suffix == ".safetensors":
        import safetensors

        with safetensors.safe_open(path, framework="numpy") as file:
            note = (file.metadata() or {}).get(CLASSES, "null")
    elif pickled.is_zipped(pathlib.Path(path)):
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
        torch = pickled.torch_module()
        tensors = {
            name: torch.from_numpy(np.require(a, None, ["C", "W"])) for name, a in arrays.items()
        }
        with atomic_write(path, (RuntimeError,)) as temporary:
            torch.save(tensors, temporary)
            if classes:
                with zipfile.ZipFile(temporary, "a") as archive:
                    archive.writestr(_classes_entry(archive), json.dumps(classes))
