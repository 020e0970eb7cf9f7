"""Encoders: every place sees every other; and two of them as a two-tower."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.init import Init, VarianceScaling
from lm.core.part import Part
from lm.layers.projection import Projection
from lm.models.decoder import Decoder

Array = jax.Array


class Encoder(Decoder):
    """embed -> stack -> head, bidirectional, with BERT's classifier of the whole sequence.

    Attributes: those of `Decoder`, of which `head` may be None, and
      pooler: maps hidden states to one vector per sequence (`FirstToken`), or None.
      classifier: a `Projection` of that vector (next-sentence prediction), or None.
    """

    pooler: nn.Module | None = None
    classifier: nn.Module | None = None

    causal = False

    def pooled(self, tokens_BT: Array, ctx: Context = Context()) -> Array:
        """Returns one (B, D) vector per sequence."""
        return self.pooler(self.hidden(tokens_BT, ctx)[0], ctx)

    def classify(self, tokens_BT: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, classes) logits of the whole sequence."""
        return self.classifier(self.pooled(tokens_BT, ctx), ctx)

    def unembed(self, x_BTD: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, T, V) logits of hidden states; ValueError where there is no head."""
        if self.head is None:
            raise ValueError("this encoder has no head: call its method 'hidden' or 'pooled'")
        return super().unembed(x_BTD, ctx)

    def initialize(self, tokens_BT: Array, ctx: Context = Context()) -> None:
        (self.hidden if self.head is None else self)(tokens_BT, ctx)
        if self.classifier is not None:
            self.classify(tokens_BT, ctx)
        elif self.pooler is not None:
            self.pooled(tokens_BT, ctx)


class FirstToken(Part):
    """tanh(dense(x_0)), BERT's pooler."""

    kernel_init: Init = VarianceScaling()

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        dense = Projection(
            x_BTD.shape[-1:],
            ("embed", "embed_out"),
            bias=True,
            kernel_init=self.kernel_init,
            name="dense",
        )
        return jnp.tanh(dense(x_BTD[:, 0], ctx))


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
        )
        left_BD = self.left.pooled(tokens_BT, ctx)
        right_BD = self.right.pooled(ctx.source_BS, right)
        return tuple(v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (left_BD, right_BD))

    def initialize(self, tokens_BT: Array, ctx: Context = Context()) -> None:
        self.left.initialize(tokens_BT, ctx)
        self.right.initialize(tokens_BT, ctx)
