"""From token ids to vectors."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.init import Init, Normal
from lm.core.part import Part
from lm.layers.dropout import Dropout
from lm.ops.product import product

Array = jax.Array


class Embed(Part):
    """A trained vector for each token, times `scale`.

    Attributes:
      vocab_size: number of tokens.
      features: D.
      scale: multiplies what is looked up, but not what `attend` compares with.
      table_init: initializer of the (V, D) table.
    """

    vocab_size: int
    features: int
    scale: float = 1.0
    table_init: Init = Normal(0.02)

    def setup(self) -> None:
        init = nn.with_logical_partitioning(self.table_init, ("vocab", "embed"))
        self.table = self.param("table", init, (self.vocab_size, self.features))

    def __call__(self, tokens_BT: Array, ctx: Context) -> Array:
        """Returns (B, T, D) in the compute dtype of `ctx`; ids must lie in [0, V)."""
        # Looked up first: a cast of the whole table would take more than the look-up, and the
        # gradients of a token's places would be summed in the compute dtype.
        x_BTD = self.table[tokens_BT].astype(ctx.dtype)
        return x_BTD * jnp.asarray(self.scale, ctx.dtype)

    def attend(self, x_BTD: Array, ctx: Context) -> Array:
        """Returns the (B, T, V) product of `x_BTD` with every token's vector (a tied head)."""
        x_BTD = x_BTD.astype(ctx.dtype)
        logits_BTV = product("btd,vd->btv", x_BTD, self.table.astype(ctx.dtype))
        return logits_BTV.astype(x_BTD.dtype)


class Entry(Part):
    """What embedded tokens meet before the first block: positions, token types, norm, dropout.

    Attributes:
      positions: a part that maps positions to vectors, or None.
      num_token_types: how many sentence ids there are; 0 for none.
      norm: applied to the sum, or None.
      dropout: rate, applied last.
      table_init: initializer of the token types.
    """

    positions: nn.Module | None = None
    num_token_types: int = 0
    norm: nn.Module | None = None
    dropout: float = 0.0
    table_init: Init = Normal(0.02)

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        features = x_BTD.shape[-1]
        if self.positions is not None:
            x_BTD += self.positions(ctx.positions_BT, features).astype(x_BTD.dtype)
        if self.num_token_types:
            init = nn.with_logical_partitioning(self.table_init, ("token_types", "embed"))
            table = self.param("token_types", init, (self.num_token_types, features))
            types_BT = 0 if ctx.token_types_BT is None else ctx.token_types_BT
            x_BTD += table.astype(x_BTD.dtype)[types_BT]
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return Dropout(self.dropout)(x_BTD, ctx)
