"""How exactly accelerators multiply float32 numbers: one choice for every program.

By itself JAX lets a TPU round the factors to bfloat16 and a GPU to TF32, each with about three
decimal digits. "highest" multiplies float32 as it is; a CPU always does.
"""

import contextlib

import jax

PRECISIONS = ("highest", "high", "default")
HIGHEST = "highest"


def of_products(precision: str) -> contextlib.AbstractContextManager:
    """Matrix products and convolutions that are traced meanwhile have this precision.

    It changes nothing where the factors are bfloat16.
    """
    return jax.default_matmul_precision(precision)
