"""Encoders: every place sees every other; and two of them as a two-tower."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.part import Part
from lm.models.decoder import Decoder

Array = jax.Array


class Encoder(Decoder):
    """A `Decoder` whose places see every other: embed -> stack -> head."""

    causal = False


class TwoTower(Part):
    """Two encoders side by side that compare what they read (encoder-encoder).

    Attributes:
      left: encoder of the tokens.
      right: encoder of `ctx.source_BS`.
    """

    left: nn.Module
    right: nn.Module

    causal = False

    @property
    def vocab_size(self) -> int:
        return self.left.vocab_size

    @property
    def max_length(self) -> int | None:
        return self.left.max_length

    def __call__(self, tokens_BT: Array, ctx: Context = Context(), state=None):
        """Returns the (B, B) cosine similarities of every left row with every right row."""
        left_BD, right_BD = self.vectors(tokens_BT, ctx)
        return left_BD @ right_BD.T, state

    def vectors(self, tokens_BT: Array, ctx: Context = Context()) -> tuple[Array, Array]:
        """Returns the (B, D) unit vectors of both sides."""
        right = Context(
            segments_BT=ctx.source_segments_BS,
            adapter_B=ctx.adapter_B,
            deterministic=ctx.deterministic,
            adapter_dropout=ctx.adapter_dropout,
            dtype=ctx.dtype,
            attention=ctx.attention,
            context_parallel=ctx.context_parallel,
            sequence_parallel=ctx.sequence_parallel,
        )
        left_BD = self.left.pooled(tokens_BT, ctx)
        right_BD = self.right.pooled(ctx.source_BS, right)
        return tuple(v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (left_BD, right_BD))

    def initialize(self, tokens_BT: Array, ctx: Context = Context()) -> None:
        self.left.initialize(tokens_BT, ctx)
        self.right.initialize(tokens_BT, ctx)
