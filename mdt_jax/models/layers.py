"""The linear layer all networks share."""

import flax.linen as nn
import jax


class Linear(nn.Dense):
    """A Dense over the last axis that runs as one 2-D matmul, with Xavier-uniform weights.

    Tokens are flattened first: XLA's CPU back end contracts a weight gradient over one flattened
    axis about twice as fast as over [batch, tokens].
    """

    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], self.features)
