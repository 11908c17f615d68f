"""Configs: the defaults, recipes, the configs that runs store, and validation."""

import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.config.fields import FIELDS, flat_fields
from mdt_jax.config.rules import check_fields, get
from mdt_jax.config.rules import validate as validate
from mdt_jax.data import sources
from mdt_jax.runtime import files
from mdt_jax.runtime.errors import UserError


def default() -> ConfigDict:
    """The defaults: MDT-S/2's shape and the published v1 recipe. Recipes change what they need."""
    groups = {
        group: {name: field.default for name, field in fields.items()}
        for group, fields in FIELDS.items()
    }
    return ConfigDict(groups).lock()


def variant(config: ConfigDict, name: str) -> ConfigDict:
    """The recipe itself ("") or "smoke": the same structure, so small that it runs in seconds.

    The smoke variant of a recipe whose data or VAE must be downloaded is trained on digits.
    """
    if name == "smoke":
        decoder_layers = min(config.model.decoder_layers, 1)
        config.model.update(hidden_size=16, depth=3, num_heads=2, decoder_layers=decoder_layers)
        config.data.batch_size = 16
        if config.vae.path != "identity" or config.data.name in sources.STORED:
            config.vae.update(path="identity", factor=8, channels=4, shift="", std="")
            config.evaluation.update(reference="", inception="")
            config.data.update(name="digits", path="", image_size=8, image_width=0, channels=1)
            config.model.num_classes = min(config.model.num_classes, 10)
        config.optim.warmup_steps = min(config.optim.warmup_steps, 1)
        config.train.update(steps=2, log_every=1, sample_every=1, checkpoint_every=1)
        config.sample.update(num_steps=3, num_samples=20, batch_size=10)
        config.evaluation.num_samples = 20
    elif name:
        raise UserError(f"unknown variant {name!r}; the only one is smoke")
    return config


def load(path: str, variant: str = "") -> ConfigDict:
    """The config of a recipe (a Python file with `get_config`) or of a run (its config.json).

    variant: for recipes, the argument of `get_config`. Raises UserError for a file that is missing
    or holds no config.
    """
    if not os.path.isfile(path):
        wrong = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"config file '{path}' {wrong}")
    if path.endswith(".json"):
        if variant:
            raise UserError(f"{path}:{variant}: a stored config has no variants")
        config = _stored(path)
    else:
        config = _recipe(path, variant)
    try:
        check_fields(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def base(recipe: str, name: str) -> ConfigDict:
    """The config of `name` in the folder of a recipe, for the recipe to change.

    recipe: __file__ of the recipe.
    """
    return load(str(pathlib.Path(recipe).with_name(name)))


def _recipe(path: str, variant: str) -> ConfigDict:
    try:
        recipe = runpy.run_path(path)
        if "get_config" not in recipe:
            raise UserError(f"{path} defines no get_config()")
        config = recipe["get_config"](*([variant] if variant else []))
    except UserError:
        raise
    except Exception as error:  # the recipe's code may raise anything
        raise UserError(f"{path} could not be read: {type(error).__name__}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return a ConfigDict, not {config!r}")
    return config


def _stored(path: str) -> ConfigDict:
    groups = files.read_json(pathlib.Path(path)) or {}
    if "model" not in groups or not all(isinstance(fields, dict) for fields in groups.values()):
        raise UserError(f"{path} holds no config; a run stores its own as config.json")
    return complete(groups)


def complete(stored: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """A config as a run stored it, with the defaults of the fields that came later."""
    groups = default().to_dict()
    for group, fields in stored.items():
        groups[group] = {**groups.get(group, {}), **fields}
    if isinstance(groups["train"]["remat"], bool):  # before there were policies
        groups["train"]["remat"] = "full" if groups["train"]["remat"] else "none"
    return ConfigDict(groups)


def override(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Set fields, given as "optim.lr": 1e-3, of a config that `load` returned."""
    for field, value in values.items():
        group, _, name = field.partition(".")
        with config[group].ignore_type():
            config[group][name] = value


def expand_paths(config: ConfigDict) -> None:
    """Replace ~ and $NAME in the fields that hold paths. Raises UserError for a URL."""
    for name, field in flat_fields():
        if field.path is not None:
            try:
                override(config, {name: field.path(get(config, name))})
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
