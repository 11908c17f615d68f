"""Keys of random numbers, always of one generator."""

import jax

# Its numbers depend on key and position alone. With others, which JAX_DEFAULT_PRNG_IMPL may ask
# for, a sample's numbers change with the size of the batch.
GENERATOR = "threefry2x32"


def key(seed: int | jax.Array) -> jax.Array:
    """The key of a seed in [0, 2^31)."""
    return jax.random.key(seed, impl=GENERATOR)
