"""The decoding loop on the device, with explicit state.

A `Reader` is how the model meets a new token: `CACHED` continues its decoding state, `RECOMPUTE`
reads the whole row again. The two draw the same tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from lm.core.context import Context
from lm.ops.sampling import Sampling, sample

Array = jax.Array
# Others, such as 'rbg', draw another number for the same key in another batch.
KEY_TYPE = "threefry2x32"


@struct.dataclass
class Prompt:
    """What is read before the first token is drawn; segments are 0 on padding.

    Attributes:
      tokens_BT, segments_BT: the prompts, padded on the left for `CACHED`, and on the right, with
        room for the new tokens, for `RECOMPUTE`.
      source_BS, source_segments_BS: for the encoder of an encoder-decoder, or None.
    """

    tokens_BT: Array
    segments_BT: Array
    source_BS: Array | None = None
    source_segments_BS: Array | None = None

    def context(self, ctx: Context) -> Context:
        return ctx.replace(
            segments_BT=self.segments_BT,
            source_BS=self.source_BS,
            source_segments_BS=self.source_segments_BS,
        )


@struct.dataclass
class Decoding:
    """Everything that is known between two tokens.

    Attributes:
      state: the reader's own, such as the model's decoding state.
      last_B: the newest token of each row; 0 where the row had finished before.
      lengths_B: number of tokens drawn in each row, the stop token included.
      limits_B: how many are wanted at most.
      finished_B: whether the row has met a stop token or its limit.
      seen_BV: which tokens the row holds, prompt included.
      keys_B: one typed PRNG key per row; token i is drawn with its key folded with i.
      sampling: the settings.
      stop_ids: tokens that end a row; -1 is none.
    """

    state: Any
    last_B: Array
    lengths_B: Array
    limits_B: Array
    finished_B: Array
    seen_BV: Array
    keys_B: Array
    sampling: Sampling
    stop_ids: Array


class Reader(NamedTuple):
    """Two functions that return the (B, 1, D) hidden states of the newest places, and a state.

    Attributes:
      begin: `(model, params, prompt, ctx) -> (x_B1D, state)`.
      append: `(model, params, tokens_B, ctx, state) -> (x_B1D, state)`.
    """

    begin: Callable
    append: Callable


def _begin_cached(model, params, prompt: Prompt, ctx: Context):
    x_BTD, state = model.apply(
        {"params": params}, prompt.tokens_BT, prompt.context(ctx), method="hidden"
    )
    return x_BTD[:, -1:], state


def _append_cached(model, params, tokens_B: Array, ctx: Context, state):
    ctx = ctx.replace(cache_length=None)
    return model.apply({"params": params}, tokens_B[:, None], ctx, state, method="hidden")


def _begin_recompute(model, params, prompt: Prompt, ctx: Context):
    ctx = prompt.context(ctx).replace(cache_length=None)
    x_BTD, _ = model.apply({"params": params}, prompt.tokens_BT, ctx, method="hidden")
    newest_B11 = prompt.segments_BT.sum(axis=1)[:, None, None] - 1
    return jnp.take_along_axis(x_BTD, newest_B11, axis=1), prompt


def _append_recompute(model, params, tokens_B: Array, ctx: Context, prompt: Prompt):
    place = (jnp.arange(tokens_B.shape[0]), prompt.segments_BT.sum(axis=1))
    prompt = prompt.replace(
        tokens_BT=prompt.tokens_BT.at[place].set(tokens_B),
        segments_BT=prompt.segments_BT.at[place].set(1),
    )
    return _begin_recompute(model, params, prompt, ctx)


CACHED = Reader(_begin_cached, _append_cached)
RECOMPUTE = Reader(_begin_recompute, _append_recompute)


def _draw(model, params, x_B1D: Array, ctx: Context, decoding: Decoding) -> Decoding:
    """Draws the next token of every row from the hidden states of the newest ones."""
    logits_B1V = model.apply({"params": params}, x_B1D, ctx, method="unembed")
    keys_B = jax.vmap(jax.random.fold_in)(decoding.keys_B, decoding.lengths_B)
    drawn_B = sample(
        logits_B1V[:, 0].astype(jnp.float32), keys_B, decoding.sampling, decoding.seen_BV
    )
    last_B = jnp.where(decoding.finished_B, 0, drawn_B)
    lengths_B = decoding.lengths_B + ~decoding.finished_B
    stopped_B = jnp.isin(last_B, decoding.stop_ids) | (lengths_B >= decoding.limits_B)
    return decoding.replace(
        last_B=last_B,
        lengths_B=lengths_B,
        finished_B=decoding.finished_B | stopped_B,
        seen_BV=decoding.seen_BV.at[jnp.arange(last_B.shape[0]), last_B].set(True),
    )


def _advance(model, params, decoding: Decoding, ctx: Context, reader: Reader) -> Decoding:
    x_B1D, state = reader.append(model, params, decoding.last_B, ctx, decoding.state)
    return _draw(model, params, x_B1D, ctx, decoding.replace(state=state))


@partial(jax.jit, static_argnames=("model", "reader"))
def start(
    model,
    params,
    prompt: Prompt,
    key_data_BK: Array,
    sampling: Sampling,
    stop_ids: Array,
    limits_B: Array,
    ctx: Context,
    reader: Reader,
) -> Decoding:
    """Reads the prompts and draws the first token of every row whose limit is not 0."""
    x_B1D, state = reader.begin(model, params, prompt, ctx)
    B = limits_B.shape[0]
    seen_BV = jnp.zeros((B, model.vocab_size), bool)
    seen_BV = seen_BV.at[jnp.arange(B)[:, None], prompt.tokens_BT].max(prompt.segments_BT != 0)
    decoding = Decoding(
        state=state,
        last_B=jnp.zeros(B, jnp.int32),
        lengths_B=jnp.zeros(B, jnp.int32),
        limits_B=limits_B,
        finished_B=limits_B == 0,
        seen_BV=seen_BV,
        keys_B=jax.random.wrap_key_data(key_data_BK, impl=KEY_TYPE),
        sampling=sampling,
        stop_ids=stop_ids,
    )
    return _draw(model, params, x_B1D, ctx, decoding)


@partial(jax.jit, static_argnames=("model", "reader"), donate_argnames="decoding")
def step(model, params, decoding: Decoding, ctx: Context, reader: Reader) -> Decoding:
    """Draws one more token of every row."""
    return _advance(model, params, decoding, ctx, reader)


@partial(jax.jit, static_argnames=("model", "reader", "room"), donate_argnames="decoding")
def finish(
    model,
    params,
    decoding: Decoding,
    ctx: Context,
    reader: Reader,
    room: int,
    steps: Array | None = None,
    waiting: Array | None = None,
) -> tuple[Array, Decoding]:
    """Draws until every row has finished, or there is no room.

    Args:
      room: tokens of a row, the newest one before this call included.
      steps: () int32, at most that many further tokens; None is as many as there is room for.
      waiting: () boolean, whether somebody waits for a row: it stops where one finishes. None is
        nobody.

    Returns:
      (B, room) int32 tokens, the first of which were there before; and the last state.
    """
    tokens_BN = jnp.zeros((decoding.last_B.shape[0], room), jnp.int32)
    tokens_BN = tokens_BN.at[:, 0].set(decoding.last_B)
    before = decoding.finished_B
    last = room - 1 if steps is None else jnp.minimum(steps, room - 1)

    def unfinished(carry):
        index, _, decoding = carry
        goes_on = (index < last) & ~jnp.all(decoding.finished_B)
        if waiting is not None:
            goes_on &= ~(waiting & jnp.any(decoding.finished_B & ~before))
        return goes_on

    def body(carry):
        index, tokens_BN, decoding = carry
        decoding = _advance(model, params, decoding, ctx, reader)
        return index + 1, tokens_BN.at[:, index + 1].set(decoding.last_B), decoding

    carry = (jnp.zeros((), jnp.int32), tokens_BN, decoding)
    _, tokens_BN, decoding = jax.lax.while_loop(unfinished, body, carry)
    return tokens_BN, decoding
