"""From hidden states to logits: over the vocabulary, and over the labels of a task."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.init import ZEROS, Init, VarianceScaling
from lm.core.part import Part
from lm.layers.dropout import Dropout
from lm.layers.embed import Embed
from lm.layers.projection import Projection, contract
from lm.ops.activation import activate
from lm.ops.sums import spread

Array = jax.Array


class Head(Part):
    """logits = x kernel + bias, with weights of its own.

    Attributes:
      vocab_size: V.
      bias: whether there is a bias.
      kernel_init, bias_init: initializers.
    """

    vocab_size: int
    bias: bool = False
    kernel_init: Init = VarianceScaling()
    bias_init: Init = ZEROS

    @nn.compact
    def __call__(self, x_BTD: Array, embed: Embed, ctx: Context) -> Array:
        shape = (x_BTD.shape[-1], self.vocab_size)
        init = nn.with_logical_partitioning(self.kernel_init, ("embed", "vocab"))
        kernel = self.param("kernel", init, shape, jnp.float32, shape[0])
        logits_BTV = contract(x_BTD.astype(ctx.dtype), kernel.astype(ctx.dtype))
        return add_bias(self, logits_BTV, self.bias_init, shape[0]) if self.bias else logits_BTV


class TiedHead(Part):
    """logits = scale * x table^T + bias, with the embedding's table (Press and Wolf, 2017).

    Attributes:
      scale: T5 has D^-0.5.
      bias: whether there is a bias of its own.
    """

    scale: float = 1.0
    bias: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array, embed: Embed, ctx: Context) -> Array:
        logits_BTV = embed.attend(x_BTD * jnp.asarray(self.scale, x_BTD.dtype), ctx)
        return add_bias(self, logits_BTV, ZEROS) if self.bias else logits_BTV


class MaskedHead(Part):
    """BERT's head: a dense layer, its activation and a norm before the tied head.

    Attributes:
      norm: applied after the activation.
      activation: a name in `lm.ops.activation`.
    """

    norm: nn.Module
    activation: str = "gelu"
    kernel_init: Init = VarianceScaling()

    @nn.compact
    def __call__(self, x_BTD: Array, embed: Embed, ctx: Context) -> Array:
        dense = Projection(
            x_BTD.shape[-1:],
            ("embed", "embed_out"),
            bias=True,
            kernel_init=self.kernel_init,
            name="dense",
        )
        x_BTD = self.norm(activate(self.activation, dense(x_BTD, ctx)))
        return add_bias(self, embed.attend(x_BTD, ctx), ZEROS)


def add_bias(head: nn.Module, logits_BTV: Array, init: Init, fan_in: int = 1) -> Array:
    """Adds a bias over the vocabulary that belongs to `head`."""
    boxed = nn.with_logical_partitioning(init, ("vocab",))
    bias_V = head.param("bias", boxed, logits_BTV.shape[-1:], jnp.float32, fan_in)
    return logits_BTV + spread(bias_V, logits_BTV)


class Labels(Projection):
    """Logits over labels, of a pooled sequence or of every place: dropout, then a projection.

    Attributes: those of `Projection`, `features` being (number of labels,), and
      dropout: rate of what comes in.
    """

    features: tuple[int, ...] = (2,)
    axes: tuple[str, ...] = ("embed", "classes")
    bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, ctx: Context) -> Array:
        return super().__call__(Dropout(self.dropout)(x, ctx), ctx)


class Span(Labels):
    """Two logits for every place: that a span begins there, and that it ends there."""


class Score(Labels):
    """One logit for every sequence, to be compared with those of the other choices."""

    features: tuple[int, ...] = (1,)
