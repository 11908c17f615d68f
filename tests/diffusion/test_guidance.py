import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.guidance import (
    constant,
    guide,
    limit_to_interval,
    power_cosine,
    power_cosine_printed,
)

T = jnp.array([999, 750, 500, 400, 300, 200, 100, 50, 0])


def test_weight_as_coded():
    expected = [1.0, 1.000105, 1.026901, 1.114446, 1.379745, 2.007723, 3.059373, 3.568937, 3.8]
    np.testing.assert_allclose(power_cosine(T, 3.8, 4.0), expected, atol=1e-6)


def test_weight_as_printed_goes_from_zero_to_w():
    weight = power_cosine_printed(T, 3.8, 4.0)
    expected = 3.8 * (1 - np.cos(np.pi * (1 - np.array(T) / 1000) ** 4)) / 2
    np.testing.assert_allclose(weight, expected, atol=1e-6)
    assert weight[0] == pytest.approx(0, abs=1e-6) and weight[-1] == pytest.approx(3.8)


def test_power_zero_is_a_constant_weight():
    np.testing.assert_allclose(power_cosine(T, 2.5, 0.0), np.full(9, 2.5), rtol=1e-6)


@pytest.mark.parametrize("channels, guided", [(3, 3), (None, 4), (9, 4)])
def test_which_channels_are_guided(channels, guided):
    strong, weak = jnp.full((2, 2, 2, 8), 2.0), jnp.full((2, 2, 2, 8), 1.0)
    out = guide(strong, weak, jnp.full(2, 5.0), channels)
    assert out.shape == (2, 2, 2, 8)
    assert np.all(out[..., :guided] == 1 + 5 * (2 - 1)) and np.all(out[..., guided:] == 2)


def test_a_constant_weight_and_one_of_each_sample():
    np.testing.assert_array_equal(constant(T, 2.5), np.full(9, 2.5, np.float32))
    t, scales = jnp.full(3, 100), jnp.array([1.0, 2.0, 3.8])
    np.testing.assert_array_equal(constant(t, scales), scales)
    each = [float(power_cosine(t[:1], scale, 4.0)[0]) for scale in scales]
    np.testing.assert_allclose(power_cosine(t, scales, 4.0), each, rtol=1e-6)


def test_a_limited_interval():
    weight = limit_to_interval(T, constant(T, 3.0), 0.1, 0.5, 1000)
    np.testing.assert_array_equal(weight, [1, 1, 3, 3, 3, 3, 3, 1, 1])
