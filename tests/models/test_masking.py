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
