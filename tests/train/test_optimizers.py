import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mdt_jax.train.optimizers import scale_by_adan

# Five gradients of two parameters; the steps below are worked out in float64.
GRADIENTS = np.random.default_rng(0).normal(size=(5, 2))


def adan_by_hand(gradients, b1=0.98, b2=0.92, b3=0.99, eps=1e-8):
    """Each step's direction, written out as in the published optimiser."""
    m = v = n = np.zeros(2)
    before, steps = gradients[0], []
    for k, g in enumerate(gradients, start=1):
        d, before = g - before, g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d
        n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
        steps.append(
            (m / (1 - b1**k) + b2 * v / (1 - b2**k)) / (np.sqrt(n) / np.sqrt(1 - b3**k) + eps)
        )
    return np.array(steps)


def directions(transformation):
    state, steps = transformation.init(jnp.zeros(2)), []
    for gradient in GRADIENTS:
        step, state = transformation.update(jnp.asarray(gradient, jnp.float32), state)
        steps.append(step)
    return np.array(steps)


def test_adan_is_the_published_one_and_optax_is_not():
    expected = adan_by_hand(GRADIENTS)
    np.testing.assert_allclose(directions(scale_by_adan()), expected, rtol=1e-5)
    assert np.abs(directions(optax.scale_by_adan()) / expected - 1).max() > 0.1


def test_adans_first_step_is_the_gradients_sign():
    first = directions(scale_by_adan())[0]
    np.testing.assert_allclose(first, np.sign(GRADIENTS[0]), rtol=1e-6)
    assert first == pytest.approx(adan_by_hand(GRADIENTS[:1])[0])
