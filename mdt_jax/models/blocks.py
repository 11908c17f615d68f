"""The parts of the transformer: its blocks and its last layer, both modulated by adaLN-Zero."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mdt_jax.models import xla
from mdt_jax.models.attention import Attention
from mdt_jax.models.layers import EPS, Linear, add_gated, gelu, modulated_norm
from mdt_jax.models.masking import Kept
from mdt_jax.models.xla import Ops


class Modulation(nn.Module):
    """`count` zero-initialised modulations [B, 1, D] of the conditioning c [B, D].

    adaLN-Zero of DiT (Peebles & Xie 2023).
    """

    count: int
    ops: Ops = Ops()

    @nn.compact
    def __call__(self, c: jax.Array) -> list[jax.Array]:
        modulation = self.get_variable("params", xla.MODULATION)
        if modulation is None:
            features, zeros = self.count * c.shape[-1], nn.initializers.zeros
            modulation = Linear(features, self.ops, zeros, name="linear")(nn.silu(c))
            modulation = checkpoint_name(modulation, xla.LINEAR_OUTPUT)  # small
        return jnp.split(modulation[:, None, :], self.count, axis=-1)


class Block(nn.Module):
    """An adaLN-Zero transformer block whose attention has a relative position bias."""

    num_heads: int
    grid: tuple[int, int]
    relative_bias: bool = True
    ops: Ops = Ops()
    mlp_norm_eps: float = EPS
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c: jax.Array,
        kept: Kept | None = None,
        skip: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """x, skip: [B, N, D]; c: [B, D]; kept: the N tokens of x; None: all of the grid.

        A block with a skip begins with Linear(2D → D) of [x, skip]. Returns the new x twice, since
        nn.scan expects (carry, output): later blocks take the stacked outputs as skips.
        """
        dim = x.shape[-1]
        if skip is not None:
            x = Linear(dim, self.ops, name="skip_linear")(jnp.concatenate([x, skip], axis=-1))
        modulation = Modulation(6, self.ops, name="modulation")(c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        x = xla.gradient_barrier(x)
        h = modulated_norm(x, shift_attn, scale_attn, self.ops)
        attention = Attention(
            self.num_heads,
            self.grid,
            self.relative_bias,
            self.ops,
            self.qk_norm,
            name="attention",
        )
        x = add_gated(x, gate_attn, attention(h, kept))

        x = xla.gradient_barrier(x)
        h = modulated_norm(x, shift_mlp, scale_mlp, self.ops, self.mlp_norm_eps)
        h = gelu(Linear(4 * dim, self.ops, name="mlp_in")(h), self.ops)
        h = Linear(dim, self.ops, name="mlp_out")(h)
        x = add_gated(x, gate_mlp, h)
        return x, x


class FinalLayer(nn.Module):
    """Tokens [B, L, D] → [B, L, features], zero at initialisation."""

    features: int
    ops: Ops = Ops()

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = Modulation(2, self.ops, name="modulation")(c)
        linear = Linear(self.features, self.ops, nn.initializers.zeros, name="linear")
        return linear(modulated_norm(x, shift, scale, self.ops))
