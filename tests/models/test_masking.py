import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models import masking


@pytest.mark.parametrize(
    "tokens, ratio, kept", [(256, 0.3, 179), (64, 0.3, 44), (16, 0.3, 11), (16, 0.0, 16)]
)
def test_keep_length(tokens, ratio, kept):
    assert masking.keep_length(tokens, ratio) == kept


def test_the_smallest_draws_are_kept_in_order():
    noise = jnp.array([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.0, 0.4]])
    np.testing.assert_array_equal(masking.keep_ids(noise, 2), [[1, 3], [2, 0]])


def test_scatter_is_the_inverse_of_gather():
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 3))
    ids = jnp.array([[4, 0, 2], [1, 2, 3]])
    fill = jnp.array([7.0, 8.0, 9.0])
    back = masking.scatter_tokens(masking.gather_tokens(tokens, ids), ids, fill, 5)
    masked = masking.masked_positions(ids, 5)
    np.testing.assert_array_equal(masked, [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    np.testing.assert_array_equal(back, jnp.where(masked[:, :, None], fill, tokens))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_places_beyond_the_count_are_dropped(count):
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 3))
    ids = jnp.array([[4, 0, 2], [1, 2, 3]])
    places = masking.places(ids, jnp.int32(count), 5)
    masked = masking.masked_positions(places, 5)
    np.testing.assert_array_equal(masked, masking.masked_positions(ids[:, :count], 5))
    kept, fill = masking.gather_tokens(tokens, ids), jnp.zeros(3)
    expected = masking.scatter_tokens(kept[:, :count], ids[:, :count], fill, 5)
    np.testing.assert_array_equal(masking.scatter_tokens(kept, places, fill, 5), expected)


def test_drawn_lengths_are_those_of_the_published_code():
    """128 to 179 of 256, each of them; the arithmetic is in float32."""
    u = np.linspace(0, 1, 10_001, dtype=np.float32)[:-1]
    counts = np.array(jax.vmap(lambda u: masking.keep_count(256, 0.3, 0.5, u))(u))
    assert sorted(set(counts.tolist())) == list(range(128, 180))
    expected = (256 * (1 - (np.float32(0.3) + np.float32(0.2) * u))).astype(np.int32)
    assert np.mean(counts == expected) > 0.999 and np.abs(counts - expected).max() <= 1
    assert masking.keep_count(4, 0.3, 0.99, jnp.float32(0.9999)) == 1
