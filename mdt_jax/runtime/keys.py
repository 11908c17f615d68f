"""Keys of random numbers, all of one generator, with one stream for each purpose."""

import enum

import jax

# Its numbers depend on key and position alone. With another generator, which the user may set by
# JAX_DEFAULT_PRNG_IMPL, a sample's numbers change with the size of the batch.
GENERATOR = "threefry2x32"


class Purpose(enum.IntEnum):
    """What the keys of a seed are for. Each value is another stream of random numbers."""

    TRAINING = 0  # the random numbers of each step
    INIT = 1  # parameters of a new run, and a newly initialised label table
    SAMPLES = 2  # noise of sample n, also of interpolations between samples
    INPAINTING = 3


def key(seed: int | jax.Array) -> jax.Array:
    """The key of a seed in [0, 2^31), from which `of` derives the keys that are drawn from."""
    return jax.random.key(seed, impl=GENERATOR)


def of(seed: int | jax.Array, purpose: Purpose) -> jax.Array:
    """The key of a seed in [0, 2^31) for one purpose."""
    return jax.random.fold_in(key(seed), purpose)
