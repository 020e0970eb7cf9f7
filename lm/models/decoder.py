"""Decoders and what all models share: their heads, and how a call's context is completed."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context, positions_of
from lm.core.part import Part
from lm.layers import cache

Array = jax.Array


class Model(Part):
    """What models with hidden states share: heads over the vocabulary and over labels.

    A subclass has `hidden`, and the fields `embed`, `head`, `pooler` and `classifier`, of which the
    last three may be None. `head(x_BTD, embed, ctx)` gives logits over the vocabulary;
    `classifier(pooler(x_BTD))` those of the whole sequence, and without a pooler of every place.
    """

    @property
    def vocab_size(self) -> int:
        return self.embed.vocab_size

    def __call__(self, tokens_BT: Array, ctx: Context = Context(), state=None):
        """Returns the (B, T, V) logits and the decoding state after `tokens_BT` (or None)."""
        x_BTD, state = self.hidden(tokens_BT, ctx, state)
        return self.unembed(x_BTD, ctx), state

    def unembed(self, x_BTD: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, T, V) logits of hidden states, in the compute dtype.

        Raises:
          ValueError: if there is no head.
        """
        if self.head is None:
            raise ValueError(
                "this model has no head over the vocabulary: call 'hidden', 'pooled' or 'classify'"
            )
        return self.head(x_BTD, self.embed, ctx)

    def pooled(self, tokens_BT: Array, ctx: Context = Context()) -> Array:
        """Returns one (B, D) vector per sequence."""
        return self.pooler(self.hidden(tokens_BT, ctx)[0], ctx)

    def classify(self, tokens_BT: Array, ctx: Context = Context()) -> Array:
        """Returns the (B, labels) logits of the sequence, or (B, T, labels) without a pooler."""
        return self.label_logits(self.hidden(tokens_BT, ctx)[0], ctx)

    def label_logits(self, x_BTD: Array, ctx: Context = Context()) -> Array:
        """Returns the logits over the labels from (B, T, D) hidden states.

        Raises:
          ValueError: if there is no classifier.
        """
        if self.classifier is None:
            raise ValueError("this model has no classifier: give it one, such as Labels((3,))")
        return self.classifier(x_BTD if self.pooler is None else self.pooler(x_BTD, ctx), ctx)

    def initialize(self, tokens_BT: Array, ctx: Context = Context()) -> None:
        """Runs every part once, so that `init` meets every parameter."""
        x_BTD, _ = self.hidden(tokens_BT, ctx)
        if self.head is not None:
            self.unembed(x_BTD, ctx)
        if self.classifier is not None:
            self.label_logits(x_BTD, ctx)
        elif self.pooler is not None:
            self.pooler(x_BTD, ctx)


class Decoder(Model):
    """embed -> stack -> head; each place sees itself and what is before it.

    Attributes:
      embed: an `Embed`.
      stack: a `Stack`.
      head: maps hidden states to logits, and gets the embedding to tie with; or None.
      max_length: longest sequence the positions allow, or None.
      pooler: maps hidden states to one vector per sequence (lm/layers/pool.py), or None.
      classifier: maps that vector, or without a pooler every place, to labels (`Labels`); or None.
    """

    embed: nn.Module
    stack: nn.Module
    head: nn.Module | None
    max_length: int | None = None
    pooler: nn.Module | None = None
    classifier: nn.Module | None = None

    causal = True

    def hidden(self, tokens_BT: Array, ctx: Context = Context(), state=None):
        """Returns the (B, T, D) output of the stack and the decoding state (or None)."""
        ctx = enter(self, tokens_BT, ctx, state)
        layers = None if state is None else state["layers"]
        x_BTD, layers = self.stack(self.embed(tokens_BT, ctx), ctx, layers)
        return x_BTD, leave(tokens_BT, ctx, layers)


def enter(model, tokens_BT: Array, ctx: Context, state) -> Context:
    """Completes what the caller left open: causality, positions, and what keys there are.

    Raises:
      ValueError: if the sequence is longer than the model's positions; a decoding state may have
        more slots than that, since padding on the left takes slots and no positions. Ids and
        the lengths of rows are values and are checked on the host, where they enter.
    """
    length = tokens_BT.shape[1]
    if model.max_length is not None and length > model.max_length:
        raise ValueError(
            f"this model has positions for {model.max_length} tokens, and {length} were given: "
            "shorten the input"
        )
    if ctx.cache_length is not None and ctx.cache_length < tokens_BT.shape[1]:
        raise ValueError(
            f"cache_length {ctx.cache_length} cannot hold the {tokens_BT.shape[1]} tokens given"
        )
    causal = model.causal if ctx.causal is None else ctx.causal
    if not causal and (state is not None or ctx.cache_length is not None):
        raise ValueError("decoding needs a causal model: a bidirectional one has no state to keep")
    segments_BT, positions_BT = ctx.segments_BT, ctx.positions_BT
    decoding = state is not None or ctx.cache_length is not None
    if segments_BT is None and decoding:
        segments_BT = jnp.ones_like(tokens_BT)
    if state is not None:
        segments_BS = cache.write(state["segments"], segments_BT, state["slot"])
        if positions_BT is None:
            new_BT = (segments_BT != 0).astype(jnp.int32)
            positions_BT = state["length"][:, None] + jnp.cumsum(new_BT, axis=1) - new_BT
        ctx = ctx.replace(slot=state["slot"], source_segments_BS=state.get("source_segments"))
    else:
        segments_BS = segments_BT
        if positions_BT is None and segments_BT is not None:
            positions_BT = positions_of(segments_BT)
        elif positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return ctx.replace(
        causal=causal, segments_BT=segments_BT, segments_BS=segments_BS, positions_BT=positions_BT
    )


def leave(tokens_BT: Array, ctx: Context, layers):
    """Returns the decoding state after a call, or None where none is kept.

    It is {'layers': the layers' own states, 'slot': () int32 the next place, which goes into slot
    `place mod S`, 'segments': (B, S) int32 of the slots, 'length': (B,) int32 tokens so far,
    without padding}, and 'source_segments' for an encoder-decoder whose source is padded.
    """
    if layers is None:
        return None
    length = tokens_BT.shape[1]
    segments_BS = ctx.segments_BS
    if ctx.slot is None:
        segments_BS = jnp.pad(segments_BS, ((0, 0), (0, ctx.cache_length - length)))
    valid_BT = ctx.segments_BT != 0
    state = {
        "layers": layers,
        "slot": jnp.asarray(length if ctx.slot is None else ctx.slot + length, jnp.int32),
        "segments": segments_BS,
        "length": jnp.max(jnp.where(valid_BT, ctx.positions_BT + 1, 0), axis=1).astype(jnp.int32),
    }
    if ctx.source_segments_BS is not None:
        state["source_segments"] = ctx.source_segments_BS
    return state
