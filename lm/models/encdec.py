"""Encoder-decoders: a decoder that also attends to the output of an encoder."""

import flax.linen as nn
import jax

from lm.core.context import Context
from lm.core.part import Part
from lm.models.decoder import enter, leave

Array = jax.Array


class EncoderDecoder(Part):
    """One embedding, an encoder stack, a decoder stack with cross attention, a head.

    The tokens are the decoder's inputs, start token included; the source comes in `ctx`. With a
    decoding state the source is in the state already, and is not read again.

    Attributes:
      embed: an `Embed`, shared by both sides.
      encoder: a `Stack`.
      decoder: a `Stack` whose blocks have cross attention.
      head: maps hidden states to logits; gets the embedding to tie with.
      start_id: the token that the decoder's input begins with.
      max_length: longest source and longest target the positions allow, or None.
    """

    embed: nn.Module
    encoder: nn.Module
    decoder: nn.Module
    head: nn.Module
    start_id: int = 0
    max_length: int | None = None

    causal = True

    @property
    def vocab_size(self) -> int:
        return self.embed.vocab_size

    def __call__(self, tokens_BT: Array, ctx: Context = Context(), state=None):
        """Returns the (B, T, V) logits and the decoding state after `tokens_BT` (or None)."""
        x_BTD, state = self.hidden(tokens_BT, ctx, state)
        return self.unembed(x_BTD, ctx), state

    def encode(self, source_BS: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, S, D) output of the encoder; `ctx` is that of the whole model."""
        inner = Context(
            segments_BT=ctx.source_segments_BS,
            adapter_B=ctx.adapter_B,
            causal=False,
            deterministic=ctx.deterministic,
            adapter_dropout=ctx.adapter_dropout,
            dtype=ctx.dtype,
            remat=ctx.remat,
            unroll=ctx.unroll,
        )
        inner = enter(self, source_BS, inner, None)
        return self.encoder(self.embed(source_BS, inner), inner)[0]

    def hidden(self, tokens_BT: Array, ctx: Context = Context(), state=None):
        """Returns the (B, T, D) output of the decoder and the decoding state (or None).

        Raises:
          ValueError: if there is neither a source nor a state that has read one.
        """
        if state is None:
            if ctx.source_BS is None:
                raise ValueError("an encoder-decoder needs a source: give ctx.source_BS")
            ctx = ctx.replace(memory_BSD=self.encode(ctx.source_BS, ctx))
        ctx = enter(self, tokens_BT, ctx, state)
        layers = None if state is None else state["layers"]
        x_BTD, layers = self.decoder(self.embed(tokens_BT, ctx), ctx, layers)
        return x_BTD, leave(tokens_BT, ctx, layers)

    def unembed(self, x_BTD: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, T, V) logits of hidden states, in the compute dtype."""
        return self.head(x_BTD, self.embed, ctx)

    def initialize(self, tokens_BT: Array, ctx: Context = Context()) -> None:
        """Runs every part once, so that `init` meets every parameter."""
        self(tokens_BT, ctx.replace(source_BS=tokens_BT))
