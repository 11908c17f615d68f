"""Derivatives of the whole network that training does not take."""

import jax
import jax.numpy as jnp
import pytest

from mdt_jax.models.mdt import MDT
from tests.models.common import random_params
from tests.published import relative_error

SMALL = dict(hidden_size=16, depth=4, num_heads=2, num_classes=3)


@pytest.mark.parametrize("changes", [
    {"depth": 3, "remat": "full", "qk_norm": True},
    {"version": "v2", "depth": 3, "decoder_layers": 1, "remat": "dots", "relative_bias": False},
], ids=str)  # fmt: skip
def test_the_network_is_differentiated_forward_and_twice(changes):
    """By x and by t, in the masked pass of a drawn length: as the backward pass has it."""
    model = MDT(input_size=(4, 4), in_channels=1, **{**SMALL, **changes})
    params, y, keep = random_params(model), jnp.array([1]), jnp.array([[2, 0, 3]])

    def network(x, t):
        x = x.reshape(1, 4, 4, 1)
        return model.apply({"params": params}, x, t[None], y, keep, jnp.int32(2)).reshape(-1)

    (x, moved), t = jax.random.normal(jax.random.key(0), (2, 16)), jnp.float32(50)
    (_, tangent), (by_x, by_t), forward = jax.jit(
        lambda: (
            jax.jvp(network, (x, t), (moved, jnp.float32(3))),
            jax.jacrev(network, (0, 1))(x, t),
            jax.jacfwd(network, (0, 1))(x, t),
        )
    )()
    assert relative_error(forward[0], by_x) < 1e-5 and relative_error(forward[1], by_t) < 1e-5
    assert relative_error(tangent, by_x @ moved + 3 * by_t) < 1e-5
    assert float(jnp.abs(by_t).max()) > 0

    def energy(x):
        return jnp.square(network(x, t)).sum()

    hessian, twice = jax.jit(lambda: (jax.hessian(energy)(x), jax.jacrev(jax.jacrev(energy))(x)))()
    assert relative_error(hessian, twice) < 1e-4 and relative_error(hessian, hessian.T) < 1e-4
