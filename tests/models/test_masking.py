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


IDS = jnp.array([[4, 0, 2], [1, 2, 3]])
TOKENS = jax.random.normal(jax.random.key(0), (2, 5, 3))


def test_put_is_the_inverse_of_take():
    kept = masking.kept_tokens(IDS, None, 5)
    np.testing.assert_array_equal(kept.visible, [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]])
    taken = masking.take(TOKENS, kept)
    np.testing.assert_array_equal(taken[1], TOKENS[1, 1:4])
    np.testing.assert_array_equal(taken[0], TOKENS[0, jnp.array([4, 0, 2])])
    back = masking.put(taken, kept)
    np.testing.assert_array_equal(back, jnp.where(kept.visible[:, :, None], TOKENS, 0))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_beyond_the_count_are_unused(count):
    kept, fewer = (
        masking.kept_tokens(*each, 5) for each in ((IDS, jnp.int32(count)), (IDS[:, :count], None))
    )
    np.testing.assert_array_equal(kept.visible, fewer.visible)
    taken = masking.take(TOKENS, kept)
    np.testing.assert_array_equal(taken[:, :count], masking.take(TOKENS, fewer))
    assert not np.any(taken[:, count:])
    tokens = jnp.ones((2, 3, 3)) * TOKENS[:, :3]
    np.testing.assert_array_equal(masking.put(tokens, kept), masking.put(tokens[:, :count], fewer))


@pytest.mark.parametrize("count", [None, 2])
def test_the_gradients_of_take_and_put_are_their_transposes(count):
    kept = masking.kept_tokens(IDS, None if count is None else jnp.int32(count), 5)
    for function, tokens in ((masking.take, TOKENS), (masking.put, TOKENS[:, :3])):
        taking = function is masking.take
        index = kept.ids if taking else kept.ranks
        used = jnp.ones((1, 3), bool) if kept.used is None else kept.used[None]
        mask = used if taking else kept.visible

        def plain(tokens, index=index, mask=mask):  # as JAX differentiates it
            rows = jnp.take_along_axis(tokens, index[:, :, None], axis=1) * mask[:, :, None]
            return (rows * jnp.arange(rows.size).reshape(rows.shape)).sum()

        def ours(tokens, function=function):
            rows = function(tokens, kept)
            return (rows * jnp.arange(rows.size).reshape(rows.shape)).sum()

        np.testing.assert_array_equal(jax.grad(ours)(tokens), jax.grad(plain)(tokens))
        assert "scatter" not in str(jax.make_jaxpr(jax.grad(ours))(tokens))


def test_drawn_lengths_are_those_of_the_published_code():
    """128 to 179 of 256, each of them; the arithmetic is in float32."""
    u = np.linspace(0, 1, 10_001, dtype=np.float32)[:-1]
    counts = np.array(jax.vmap(lambda u: masking.keep_count(256, 0.3, 0.5, u))(u))
    assert sorted(set(counts.tolist())) == list(range(128, 180))
    expected = (256 * (1 - (np.float32(0.3) + np.float32(0.2) * u))).astype(np.int32)
    assert np.mean(counts == expected) > 0.999 and np.abs(counts - expected).max() <= 1
    assert masking.keep_count(4, 0.3, 0.99, jnp.float32(0.9999)) == 1
