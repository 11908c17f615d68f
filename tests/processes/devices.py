"""Twenty steps on different meshes of eight devices: python -m tests.processes.devices OUT

Writes OUT/<name>.npz for each of VARIANTS: the losses, and the parameters before and after. It is a
process of its own, because the number of devices is fixed when JAX starts.
"""

import functools
import sys

import jax
import numpy as np

from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import parallel
from mdt_jax.train import inputs
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state, init_state
from mdt_jax.train.step import compile_step, draw_step

STEPS, DEVICES = 20, 8
# devices, fsdp, remat, accumulate, version
VARIANTS = {
    "one": (1, 1, "none", 1, "v1"),
    "data": (8, 1, "none", 1, "v1"),
    "fsdp": (8, 8, "none", 1, "v1"),
    "both": (8, 4, "none", 1, "v1"),
    "one_in_parts": (1, 1, "full", 4, "v1"),
    "both_in_parts": (8, 4, "dots", 2, "v1"),
    "v2_one": (1, 1, "none", 1, "v2"),
    "v2_both": (8, 2, "full", 2, "v2"),
}


def make_config(version: str):
    """Large enough that the stacks of blocks are split over `fsdp`."""
    config = configs.default()
    config.model.update(hidden_size=64, depth=3, num_heads=2, decoder_layers=1, version=version)
    config.data.batch_size = 32
    config.optim.lr = 1e-3
    if version == "v2":
        config.mask.ratio_max = 0.5
        config.diffusion.loss_weight = "min_snr_5"
        config.optim.update(name="adan", clip_norm=1.0)
    return config


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def first_state(version: str):
    """As NumPy arrays: what a step donates is gone."""
    config = make_config(version)
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    state = jax.jit(init_state, static_argnums=(0, 1))(model, optimizer, jax.random.key(1))
    return jax.tree.map(np.asarray, state)


def run(name: str) -> dict[str, np.ndarray]:
    devices, fsdp, remat, accumulate, version = VARIANTS[name]
    config = make_config(version)
    config.train.update(remat=remat, accumulate=accumulate)
    config.mesh.fsdp = fsdp
    configs.validate(config, devices)
    mesh = parallel.make_mesh(0, fsdp, jax.devices()[:devices])
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    abstract = abstract_state(model, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = first_state(version)
    before = flat(state.params)
    state = jax.device_put(state, shardings)
    if fsdp > 1:
        kernel = state.params["side_interpolater"]["mlp_in"]["kernel"]
        held = {shard.data.size for shard in kernel.addressable_shards}
        assert held == {kernel.size // fsdp}, held
    key = jax.device_put(jax.random.key(0), parallel.replicated(mesh))
    rate = jax.device_put(np.float32(config.optim.lr), parallel.replicated(mesh))
    step = compile_step(config, model, optimizer, abstract, mesh)
    batches, losses = inputs.feed(config, inputs.open_inputs(config), mesh, 0), []
    for _ in range(STEPS):
        state, metrics = step(state, next(batches), key, rate)
        losses.append([metrics["loss"], metrics["grad_norm"], metrics["mse/masked/q2"]])
    batches.close()
    arrays = {f"before{path}": leaf for path, leaf in before.items()}
    arrays |= {f"after{path}": leaf for path, leaf in flat(state.params).items()}
    return {"losses": np.array(losses), **arrays}


def spread_draws() -> dict[str, np.ndarray]:
    """A step's draws, made on eight devices, each its own rows."""
    config = make_config("v1")
    model, split = MDT.from_config(config), parallel.split_batch(parallel.make_mesh(0, 2))

    def noise(key):
        return draw_step(key, 3, model, 32, 1000).noise_full

    spread = jax.jit(noise, out_shardings=split)(jax.random.key(0))
    assert len({str(shard.index) for shard in spread.addressable_shards}) == DEVICES
    return {"spread": np.asarray(spread), "one": np.asarray(jax.jit(noise)(jax.random.key(0)))}


if __name__ == "__main__":
    assert jax.device_count() == DEVICES
    out = sys.argv[1]
    np.savez(f"{out}/draws.npz", **spread_draws())
    for name in VARIANTS:
        np.savez(f"{out}/{name}.npz", **run(name))
