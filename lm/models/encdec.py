"""Encoder-decoders: a decoder that also attends to the output of an encoder; or that alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.models.decoder import Model, enter, leave

Array = jax.Array


class EncoderDecoder(Model):
    """One embedding, an encoder stack, a decoder stack with cross attention, a head.

    The tokens are the decoder's inputs, start token included; the source comes in `ctx`. With a
    decoding state the source is in the state already, and is not read again.

    Attributes:
      embed: an `Embed`, shared by both sides.
      encoder: a `Stack`.
      decoder: a `Stack` whose blocks have cross attention; or None, where the encoder alone reads
        the tokens, as to label each of them.
      head: maps hidden states to logits, and gets the embedding to tie with; or None.
      start_id: the token that the decoder's input begins with.
      max_length: longest source and longest target the positions allow, or None.
      pooler, classifier: over the last hidden states, as of `Decoder`.
    """

    embed: nn.Module
    encoder: nn.Module
    decoder: nn.Module | None
    head: nn.Module | None
    start_id: int = 0
    max_length: int | None = None
    pooler: nn.Module | None = None
    classifier: nn.Module | None = None

    causal = True

    def encode(self, source_BS: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, S, D) output of the encoder; `ctx` is that of the whole model."""
        inner = Context(
            segments_BT=ctx.source_segments_BS,
            adapter_B=ctx.adapter_B,
            causal=False,
            deterministic=ctx.deterministic,
            adapter_dropout=ctx.adapter_dropout,
            dtype=ctx.dtype,
            attention=ctx.attention,
            context_parallel=ctx.context_parallel,
            sequence_parallel=ctx.sequence_parallel,
            remat=ctx.remat,
            unroll=ctx.unroll,
            pipeline=ctx.pipeline,
        )
        inner = enter(self, source_BS, inner, None)
        return self.encoder(self.embed(source_BS, inner), inner)[0]

    def hidden(self, tokens_BT: Array, ctx: Context = Context(), state=None):
        """Returns the (B, T, D) output of the last stack and the decoding state (or None).

        Raises:
          ValueError: if there is neither a source nor a state that has read one.
        """
        if self.decoder is None:
            return self.encode(tokens_BT, ctx.replace(source_segments_BS=ctx.segments_BT)), None
        if state is None:
            if ctx.source_BS is None:
                raise ValueError("an encoder-decoder needs a source: give ctx.source_BS")
            ctx = ctx.replace(memory_BSD=self.encode(ctx.source_BS, ctx))
        ctx = enter(self, tokens_BT, ctx, state)
        layers = None if state is None else state["layers"]
        x_BTD, layers = self.decoder(self.embed(tokens_BT, ctx), ctx, layers)
        return x_BTD, leave(tokens_BT, ctx, layers)

    def classify(self, tokens_BT: Array, ctx: Context = Context()) -> Array:
        """Returns logits over labels; both sides read `tokens_BT`, the decoder one place later.

        So do T5's classes. The segments of `ctx` are those of the tokens; it needs no source.
        """
        if self.decoder is None:
            return super().classify(tokens_BT, ctx)
        start_B1 = jnp.full_like(tokens_BT[:, :1], self.start_id)
        shifted_BT = jnp.concatenate([start_B1, tokens_BT[:, :-1]], axis=1)
        ctx = ctx.replace(source_BS=tokens_BT, source_segments_BS=ctx.segments_BT)
        return super().classify(shifted_BT, ctx)

    def initialize(self, tokens_BT: Array, ctx: Context = Context()) -> None:
        super().initialize(tokens_BT, ctx.replace(source_BS=tokens_BT))
