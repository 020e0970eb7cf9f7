"""Decoders that also classify: a head of its own beside the one over the vocabulary."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.models.decoder import Decoder

Array = jax.Array


class DecoderClassifier(Decoder):
    """A decoder with p(y | x) = softmax(classifier(h)), h the hidden state of the last token.

    Its parameters are those of the `Decoder`, at the same paths, and 'classifier/...'.

    Attributes: those of `Decoder`, and
      classifier: a `Projection` to the number of classes.
    """

    classifier: nn.Module | None = None

    def classify(self, tokens_BT: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, classes) logits of p(y | x)."""
        return self.label_logits(self.hidden(tokens_BT, ctx)[0], ctx)

    def label_logits(self, x_BTD: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, classes) logits from (B, T, D) hidden states."""
        last_B = jnp.full(x_BTD.shape[:1], x_BTD.shape[1] - 1)
        if ctx.segments_BT is not None:
            index_T = jnp.arange(x_BTD.shape[1])
            last_B = jnp.where(ctx.segments_BT != 0, index_T, 0).max(axis=1)
        last_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
        assert self.classifier is not None, "a DecoderClassifier without a classifier"
        return self.classifier(last_BD, ctx)

    def initialize(self, tokens_BT: Array, ctx: Context = Context()) -> None:
        self(tokens_BT, ctx)
        self.classify(tokens_BT, ctx)
