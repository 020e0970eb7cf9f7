"""The decoding loop on the device, with explicit state.

A `Reader` is how the model meets a new token: `CACHED` continues its decoding state, `RECOMPUTE`
reads the whole row again. The two draw the same tokens.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer

from lm.core.context import Context
from lm.core.mesh import target_platform
from lm.models.kernels import turn
from lm.models.stack import apart
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
      key_data_BK: one PRNG key per row; token i is drawn with its key folded with i.
      sampling: the settings.
      stop_ids: tokens that end a row; -1 is none.
    """

    state: Any
    last_B: Array
    lengths_B: Array
    limits_B: Array
    finished_B: Array
    seen_BV: Array
    key_data_BK: Array
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
    keys_B = jax.random.wrap_key_data(decoding.key_data_BK, impl=KEY_TYPE)
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, decoding.lengths_B)
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
    # What a finished row reads is padding, so that its place does not grow beyond the model's.
    ctx = ctx.replace(segments_BT=(~decoding.finished_B)[:, None].astype(jnp.int32))
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
    params = apart(params)
    x_B1D, state = reader.begin(model, params, prompt, ctx)
    decoding = _undrawn(model, prompt, apart(state), key_data_BK, sampling, stop_ids, limits_B)
    return _draw(model, params, x_B1D, ctx, decoding)


def _undrawn(
    model, prompt: Prompt, state, key_data_BK, sampling, stop_ids, limits_B: Array
) -> Decoding:
    """Returns what is known before the first token is drawn."""
    B = limits_B.shape[0]
    seen_BV = jnp.zeros((B, model.vocab_size), bool)
    seen_BV = seen_BV.at[jnp.arange(B)[:, None], prompt.tokens_BT].max(prompt.segments_BT != 0)
    return Decoding(
        state=state,
        last_B=jnp.zeros(B, jnp.int32),
        lengths_B=jnp.zeros(B, jnp.int32),
        limits_B=limits_B,
        finished_B=limits_B == 0,
        seen_BV=seen_BV,
        key_data_BK=key_data_BK,
        sampling=sampling,
        stop_ids=stop_ids,
    )


class _Apart(NamedTuple):
    """Parameters as the loop has them, and weak references to the arrays they were made of."""

    key: tuple
    made_of: list[weakref.ref]
    params: Any


_latest: list[_Apart] = []


def lay_apart(model, params, dtype: str = "float32"):
    """Returns parameters as the loop has them: on a CPU with a layer's apart, and kernels turned.

    There it is a copy, made once for many calls: the newest one is kept until the first of the
    arrays that it was made of is gone.

    Args:
      model: a model value.
      params: its parameters.
      dtype: the compute dtype.
    """
    if target_platform() != "cpu":
        return params
    leaves = jax.tree.leaves(params)
    key = (model, dtype, jax.tree.structure(params))
    if _latest and _latest[0].key == key:
        known = _latest[0].made_of
        if len(known) == len(leaves) and all(ref() is leaf for ref, leaf in zip(known, leaves)):
            return _latest[0].params
    _latest.clear()
    made = _lay_apart(model, params, dtype == "float32")
    # What a caller may change in place, or is only traced, is not remembered.
    if all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in leaves):
        refs = [weakref.ref(leaf, lambda _: _latest.clear()) for leaf in leaves]
        _latest.append(_Apart(key, refs, made))
    return made


@partial(jax.jit, static_argnums=(0, 2))
def _lay_apart(model, params, turns: bool):
    return apart(turn(model, params) if turns else params)


@partial(jax.jit, static_argnames=("model", "slots"))
def idle(model, params, slots: int, stop_ids: Array, ctx: Context, place: Array) -> Decoding:
    """Returns rows that are all free, for `admit`: the state of no tokens, from a place on.

    Args:
      slots: B.
      stop_ids: as of `Decoding`.
      ctx: with the cache's length and dtype.
      place: () int32, the first that is decoded, and no less than a prompt is long.
    """
    tokens_B1 = jnp.zeros((slots, 1), jnp.int32)
    prompt, zeros_B = Prompt(tokens_B1, tokens_B1), jnp.zeros(slots)
    _, state = jax.eval_shape(partial(_begin_cached, model), params, prompt, ctx)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    state = apart({**state, "slot": place})
    sampling = Sampling(zeros_B, zeros_B.astype(jnp.int32), zeros_B + 1, zeros_B, zeros_B + 1)
    key_data_BK = jnp.zeros((slots, 2), jnp.uint32)
    limits_B = jnp.zeros(slots, jnp.int32)
    return _undrawn(model, prompt, state, key_data_BK, sampling, stop_ids, limits_B)


@partial(jax.jit, static_argnames="model", donate_argnames="decoding")
def admit(
    model,
    params,
    decoding: Decoding,
    row: Array,
    prompt: Prompt,
    key_data_1K: Array,
    sampling: Sampling,
    limit_1: Array,
    ctx: Context,
) -> Decoding:
    """Gives a row to another prompt, reads it, and draws its first token.

    It is read as if it stood just before the place where all rows go on, into a state of nothing.

    Args:
      row: () int32.
      prompt: one, padded on the left.
      key_data_1K, sampling, limit_1: of this prompt.
      ctx: of this row.
    """
    params = apart(params)
    slots, length = len(decoding.last_B), prompt.tokens_BT.shape[1]

    def nothing(path, leaf):
        shape = list(leaf.shape)
        if shape:
            shape[_row_axis(path)] //= slots
        return jnp.zeros(shape, leaf.dtype)

    state = jax.tree_util.tree_map_with_path(nothing, decoding.state)
    state["slot"] = decoding.state["slot"] - length
    x_1TD, state = model.apply(
        {"params": params}, prompt.tokens_BT, prompt.context(ctx), state, method="hidden"
    )
    one = _undrawn(model, prompt, state, key_data_1K, sampling, decoding.stop_ids, limit_1)
    one = _draw(model, params, x_1TD[:, -1:], ctx, one)

    def put(path, whole, new):
        if not whole.ndim:
            return whole
        axis = _row_axis(path)
        first = row * new.shape[axis]  # A cache has several of its own rows for one of ours.
        return jax.lax.dynamic_update_slice_in_dim(whole, new, first, axis)

    changed = jax.tree_util.tree_map_with_path(put, decoding, one)
    return changed.replace(stop_ids=decoding.stop_ids)


def _row_axis(path: tuple) -> int:
    """Returns the dimension of a leaf of `Decoding` that is the rows: that of a stack is 1."""
    stacked = any(getattr(key, "key", None) == "pattern" for key in path)
    return int(stacked and isinstance(path[-1], jax.tree_util.DictKey))


@partial(jax.jit, static_argnames=("model", "reader"), donate_argnames="decoding")
def step(model, params, decoding: Decoding, ctx: Context, reader: Reader) -> Decoding:
    """Draws one more token of every row."""
    return _advance(model, apart(params), decoding, ctx, reader)


@partial(jax.jit, static_argnames=("model", "reader", "room"), donate_argnames="decoding")
def finish(
    model,
    params,
    decoding: Decoding,
    ctx: Context,
    reader: Reader,
    room: int,
    steps: Array,
    waiting: Array,
) -> tuple[Array, Decoding]:
    """Draws until every row has finished, or there is no room.

    Args:
      room: tokens of a row, the newest one before this call included.
      steps: () int32, at most that many further tokens.
      waiting: () boolean, whether somebody waits for a row: it then stops where one finishes.

    Returns:
      (B, room) int32 tokens, the first of which were there before; and the last state.
    """
    params = apart(params)
    tokens_BN = jnp.zeros((decoding.last_B.shape[0], room), jnp.int32)
    tokens_BN = tokens_BN.at[:, 0].set(decoding.last_B)
    before = decoding.finished_B
    last = jnp.minimum(steps, room - 1)

    def unfinished(carry):
        index, _, decoding = carry
        is_free = waiting & jnp.any(decoding.finished_B & ~before)
        return (index < last) & ~jnp.all(decoding.finished_B) & ~is_free

    def body(carry):
        index, tokens_BN, decoding = carry
        decoding = _advance(model, params, decoding, ctx, reader)
        return index + 1, tokens_BN.at[:, index + 1].set(decoding.last_B), decoding

    carry = (jnp.zeros((), jnp.int32), tokens_BN, decoding)
    _, tokens_BN, decoding = jax.lax.while_loop(unfinished, body, carry)
    return tokens_BN, decoding
