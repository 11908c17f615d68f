"""Keys of random numbers, always of one generator, and one for each purpose."""

import enum

import jax

# Its numbers depend on key and position alone. With others, which JAX_DEFAULT_PRNG_IMPL may ask
# for, a sample's numbers change with the size of the batch.
GENERATOR = "threefry2x32"


class Purpose(enum.IntEnum):
    """What the keys of a seed are for; another value is another stream of random numbers."""

    TRAINING = 0  # the draws of each step
    INIT = 1  # parameters of a new run, and a label table that is drawn anew
    SAMPLES = 2  # noise of sample n, of walks between samples too
    INPAINTING = 3


def key(seed: int | jax.Array) -> jax.Array:
    """The key of a seed in [0, 2^31), from which `of` derives others. Nothing is drawn with it."""
    return jax.random.key(seed, impl=GENERATOR)


def of(seed: int | jax.Array, purpose: Purpose) -> jax.Array:
    """The key of a seed in [0, 2^31) for one purpose."""
    return jax.random.fold_in(key(seed), purpose)
