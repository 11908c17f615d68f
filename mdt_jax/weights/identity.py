"""What tells networks apart: the fields that define one, and a hash of its parameters."""

import dataclasses
import hashlib

import flax.linen as nn
import jax
import numpy as np

from mdt_jax.runtime import hosts


def fields_of(model: nn.Module) -> dict:
    """The fields that define a network, without those that only say how to compute it."""
    computed = (
        "dtype",
        "remat",
        "gather",
        "attention",
        "unroll",
        "modulate_first",
        "ops",
        "parent",
        "name",
    )
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {name: value for name, value in fields.items() if name not in computed}


def params_sha256(params: dict) -> str:
    """SHA-256 of a network's parameters by name, independent of their file; hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode())
        leaf = hosts.fetch(leaf) if isinstance(leaf, jax.Array) else leaf
        digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return digest.hexdigest()
