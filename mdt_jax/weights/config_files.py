"""The config.json beside a model.safetensors: all of a network that its file cannot record."""

import pathlib
from typing import Any

from mdt_jax import __version__
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import read_json
from mdt_jax.weights import orbax_folders
from mdt_jax.weights.picking import CONFIG, OURS

MARK = "mdt_jax"  # the key that other programs' config.json lacks
SUM = "parameters_sha256"
# Fields of an MDT that the names and shapes in its file tell.
TOLD = (
    "input_size", "in_channels", "hidden_size", "depth", "num_heads", "patch_size",
    "decoder_layers", "num_classes", "version", "learn_sigma",
)  # fmt: skip


def content(meta: dict, params_sha256: str) -> dict[str, Any]:
    """What config.json holds. meta: as of `kinds.meta_of`."""
    meta = {MARK: __version__, "format": orbax_folders.FORMAT, **meta, SUM: params_sha256}
    return meta | {orbax_folders.SUM: orbax_folders.meta_sha256(meta)}


def read(file: pathlib.Path) -> dict[str, Any] | None:
    """The content of the config.json of an MDT's file; None where there is none of this package.

    Raises UserError where it is damaged, or of a newer format.
    """
    path = file.with_name(CONFIG)
    if file.name != OURS or not path.is_file():
        return None
    meta = read_json(path) or {}
    if MARK not in meta or not ("config" in meta or is_mdt(meta.get("model"))):
        return None
    if meta.get(orbax_folders.SUM) != orbax_folders.meta_sha256(meta):
        raise UserError(
            "its config.json is damaged, or was edited; restore it, or to read the file alone move "
            "config.json away"
        )
    if meta["format"] > orbax_folders.FORMAT:
        raise UserError(
            f"its config.json is of format {meta['format']}, newer than the "
            f"{orbax_folders.FORMAT} that this mdt_jax knows: install a newer one"
        )
    return meta


def is_mdt(model: object) -> bool:
    """Whether the entry `model` of a meta is of an MDT."""
    return isinstance(model, dict) and model.get("kind") == "mdt"
