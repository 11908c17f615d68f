"""Upload a network to the hub: model.safetensors, config.json and README.md in one commit."""

import json
import pathlib
import tempfile

from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import config_files, kinds, mdt_names, networks, published_files
from mdt_jax.weights.kinds import Weights
from mdt_jax.weights.picking import CONFIG, OURS


def publish(path: str, weights: Weights, readme: str, public: bool) -> tuple[str, bool]:
    """Upload a network; `load` reads it back to the same bits.

    path, public, and what is returned: as of `hub.upload`. readme: the model card. Raises
    UserError, before anything is uploaded where the published code cannot represent the model.
    """
    if isinstance(weights.model, MDT):
        state = mdt_names.to_published(weights.model, weights.params)
        if different := published_files.different_fields(state, weights.model):
            raise UserError(f"{', '.join(different)} could not be read back: nothing was uploaded")
        del state
    with tempfile.TemporaryDirectory(prefix="mdt_jax-") as name:
        folder = pathlib.Path(name)
        networks.save(folder / OURS, weights)
        _write(folder / CONFIG, json.dumps(config_of(weights), indent=1) + "\n")
        _write(folder / "README.md", readme)
        summary = kinds.describe(weights.model)
        return hub.upload(path, folder, public, f"mdt_jax.convert: {summary}")


def config_of(weights: Weights) -> dict:
    """What config.json holds; for a VAE also the fields under which diffusers looks."""
    meta = kinds.meta_of(weights)
    if isinstance(weights.model, AutoencoderKL):
        meta |= {**(weights.latents or {}), "norm_num_groups": weights.model.groups}
    return config_files.content(meta, kinds.params_sha256(weights.params))


def _write(path: pathlib.Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
