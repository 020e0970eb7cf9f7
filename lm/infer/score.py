"""What a model says of given text: how likely it is, and one vector for each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.context import Context
from lm.infer.rows import (
    Rows,
    bucket,
    check,
    encode,
    encode_both_ends,
    encode_source,
    pack,
    width_of,
)
from lm.models.adapter_rows import Adapters, choose
from lm.models.encdec import EncoderDecoder
from lm.ops.loss import token_nll

Array = jax.Array
CHUNK = 128  # Places whose logits are in memory at a time.
Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood(NamedTuple):
    """What a model says of a continuation.

    Attributes:
      sum: ln p(continuation | context), in nats.
      is_greedy: whether each of its tokens is the likeliest.
    """

    sum: float
    is_greedy: bool


class Score(NamedTuple):
    """Log-likelihood of one text.

    Attributes:
      sum: ln p(text), in nats.
      per_token: sum / tokens.
      tokens: number of tokens that were predicted.
    """

    sum: float
    per_token: float
    tokens: int


def score(
    loaded: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
    dtype: str = "float32",
    adapters: Adapters = None,
) -> list[Score]:
    """Returns ln p of each text, or of each pair's second text given its first.

    sum_t ln p(x_t | x_<t) over the text's tokens; neither the start token nor an end is counted.
    The two texts of a pair are tokenized apart.

    Args:
      loaded: has `.model`, `.params` and `.tokenizer`.
      texts: texts, or pairs (context, continuation). An encoder-decoder takes pairs (source,
        target).
      batch_size: rows that are read at once; rows of similar length go together.
      dtype: the compute dtype.
      adapters: which of the model's adapters each text meets (`lm.models.adapter_rows.choose`).

    Raises:
      ValueError: if a text is too long, there is nothing to predict in it, the model is
        bidirectional, or has not the adapters asked for.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    check_causal(model)
    pairs = [(None, text) if isinstance(text, str) else tuple(text) for text in texts]
    has_encoder = isinstance(model, EncoderDecoder)
    rows, contexts, sources = [], [], []
    for context, text in pairs:
        if has_encoder:
            if context is None:
                raise ValueError("this model is an encoder-decoder: score pairs (source, target)")
            sources.append(encode_source(tokenizer, context))
            before = [model.start_id]
        else:
            before = encode(tokenizer, context or "")
        rows.append([*before, *tokenizer.encode(text)])
        # Without a start token the first token has nothing to be predicted from.
        contexts.append(max(len(before), 1))
    check(rows, model, "text")
    if has_encoder:
        check(sources, model, "source")
    for index, (row, context) in enumerate(zip(rows, contexts)):
        if len(row) <= context:
            raise ValueError(f"text {index} has no token to predict: give it more text")
    adapter_N = choose(loaded.params, adapters, len(rows))
    scores: list[Score] = [Score(0.0, 0.0, 0)] * len(rows)
    for group in groups(rows, batch_size):
        count = bucket(len(group))
        tokens, ctx = packed(model, rows, sources, group, count)
        ctx = ctx.replace(dtype=dtype, adapter_B=adapters_at(adapter_N, group, count))
        nll = np.asarray(_score_rows(model, loaded.params, tokens, ctx), np.float64)
        for row, index in enumerate(group):
            # Column t is about token t + 1.
            found = -nll[row, contexts[index] - 1 : len(rows[index]) - 1]
            scores[index] = Score(float(found.sum()), float(found.mean()), len(found))
    return scores


def loglikelihood(
    loaded: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
    dtype: str = "float32",
) -> list[Likelihood]:
    """Returns ln p of each continuation of a context, as benchmarks ask for it.

    Unlike `score` it tokenizes a pair as one text: see `encode_pair`.

    Args:
      loaded: has `.model`, `.params` and `.tokenizer`.
      pairs: (context, continuation). An encoder-decoder reads the context as its source.
      batch_size, dtype: as of `loglikelihood_tokens`.

    Raises:
      ValueError: as `loglikelihood_tokens`.
    """
    ids = [encode_pair(loaded, context, continuation) for context, continuation in pairs]
    return loglikelihood_tokens(loaded, ids, batch_size=batch_size, dtype=dtype)


def encode_pair(loaded: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of its continuation, as lm-evaluation-harness cuts them.

    White space at the end of the context belongs to the continuation, since tokens begin with it.
    A decoder's continuation is what the ids of the whole text have beyond as many as the context
    has alone; an encoder-decoder tokenizes the two apart. An empty context is the start token, or
    the continuation's own first token where there is none.
    """
    tokenizer = loaded.tokenizer
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    if isinstance(loaded.model, EncoderDecoder):
        return encode_source(tokenizer, context), tokenizer.encode(continuation)
    before = encode(tokenizer, context)
    if context:
        return before, encode(tokenizer, context + continuation)[len(before) :]
    after = tokenizer.encode(continuation)
    return (before, after) if before and before != after[:1] else (after[:1], after[1:])


def num_too_long(model: Any, pairs: Sequence[Pair]) -> int:
    """Returns how many pairs of ids `loglikelihood_tokens` has to cut to the model's positions."""
    limit = model.max_length
    if limit is None:
        return 0
    if isinstance(model, EncoderDecoder):
        return sum(len(source) > limit or len(target) > limit for source, target in pairs)
    return sum(len(context) + len(continuation) > limit + 1 for context, continuation in pairs)


def loglikelihood_tokens(
    loaded: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
    dtype: str = "float32",
    on_batch: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """Returns ln p of each continuation of a context, both given as ids.

    What is longer than the model's positions is cut on the left. The last token of a continuation
    is not read, so that a model of P positions takes P + 1 tokens. Rows of similar length are read
    together, the longest first; a batch has one number of rows in all calls of one batch size, and
    its width is a `bucket`, so that few programs are compiled. Logits are computed where
    continuations are, and nowhere else.

    Args:
      loaded: has `.model` and `.params`.
      pairs: (context, continuation); of an encoder-decoder, (source, target without the start).
      batch_size: rows that are read at once.
      dtype: the compute dtype.
      on_batch: is told after each batch how many pairs were in it.

    Raises:
      ValueError: if the model is bidirectional, a context or a continuation is empty, or an id is
        out of range.
    """
    model, limit = loaded.model, loaded.model.max_length
    check_causal(model)
    has_encoder = isinstance(model, EncoderDecoder)
    inputs, targets, sources = [], [], []
    for context, continuation in pairs:
        row = [model.start_id] if has_encoder else list(context)
        row = [*row, *continuation]
        row = row if limit is None else row[-limit - 1 :]
        inputs.append(row[:-1])
        targets.append(row[1:][-len(continuation) :] if continuation else [])
        sources.append(list(context) if limit is None else list(context)[-limit:])
    check(sources, model, "context")
    check(targets, model, "continuation")
    check(inputs, model, "request")
    most = bucket(max(len(row) for row in targets), least=16)
    count = bucket(min(batch_size, len(inputs)))
    found: list[Likelihood] = [Likelihood(0.0, False)] * len(inputs)
    # The longest first: what does not fit into memory fails at once.
    for group in reversed(groups(inputs, batch_size)):
        tokens, ctx = packed(model, inputs, sources, group, count)
        ctx = ctx.replace(dtype=dtype)
        targets_BN = np.zeros((count, min(most, tokens.shape[1])), np.int32)
        places_BN = np.zeros_like(targets_BN)
        for row, index in enumerate(group):
            wanted, end = targets[index], len(inputs[index])
            targets_BN[row, : len(wanted)] = wanted
            places_BN[row, : len(wanted)] = range(end - len(wanted), end)
        nll, hits = jax.device_get(
            _score_places(model, loaded.params, tokens, targets_BN, places_BN, ctx)
        )
        for row, index in enumerate(group):
            n = len(targets[index])
            total = -float(nll[row, :n].sum(dtype=np.float64))
            found[index] = Likelihood(total, bool(hits[row, :n].all()))
        if on_batch is not None:
            on_batch(len(group))
    return found


def check_causal(model: Any) -> None:
    """Refuses a model that predicts no next token."""
    if not model.causal:
        raise ValueError(
            "a bidirectional model gives no likelihood to a text: score with a causal one"
        )


def embed(
    loaded: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    dtype: str = "float32",
    adapters: Adapters = None,
) -> np.ndarray:
    """Returns the mean over each text's places of the last hidden states, (num_texts, D) fp32.

    The start token is one of the places, and so is the end of what a bidirectional model reads.
    An encoder-decoder's are those of its encoder.

    Args: as of `score`.

    Raises:
      ValueError: if a text is too long, or has no token at all, or the model has not the adapters
        asked for.
    """
    model = loaded.model
    if isinstance(model, EncoderDecoder):
        read = encode_source
    else:
        read = encode if model.causal else encode_both_ends
    rows = [read(loaded.tokenizer, text) for text in texts]
    check(rows, model, "text")
    adapter_N = choose(loaded.params, adapters, len(rows))
    vectors = [np.zeros(0)] * len(rows)
    for group in groups(rows, batch_size):
        some, count = rows_at(rows, group), bucket(len(group))
        tokens, segments = pack(some, width_of(some, model), count)
        ctx = Context(dtype=dtype, adapter_B=adapters_at(adapter_N, group, count))
        means = np.asarray(_mean_rows(model, loaded.params, tokens, segments, ctx))
        for row, index in enumerate(group):
            vectors[index] = means[row]
    return np.stack(vectors)


def groups(rows: Rows, batch_size: int) -> list[list[int]]:
    """Returns the rows' numbers in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def packed(
    model: Any, rows: Rows, sources: Rows, group: Sequence[int], count: int
) -> tuple[np.ndarray, Context]:
    """Returns the (count, T) tokens of some of the rows, and the context of reading them.

    An encoder-decoder reads their sources beside them.
    """
    some = rows_at(rows, group)
    tokens, segments = pack(some, width_of(some, model), count)
    ctx = Context(segments_BT=segments)
    if isinstance(model, EncoderDecoder):
        some = rows_at(sources, group)
        source, source_segments = pack(some, width_of(some, model), count)
        ctx = ctx.replace(source_BS=source, source_segments_BS=source_segments)
    return tokens, ctx


def adapters_at(
    adapter_N: np.ndarray | None, group: Sequence[int], count: int
) -> np.ndarray | None:
    """Returns the (count,) adapters of some of the rows; the base alone where there is no row."""
    if adapter_N is None:
        return None
    return np.append(adapter_N[list(group)], np.full(count - len(group), -1, np.int32))


def rows_at(rows: Rows, group: Sequence[int]) -> Rows:
    return [rows[index] for index in group]


def predict(
    model: Any,
    params: Any,
    tokens_BT: Array,
    targets_BT: Array,
    ctx: Context,
    places_BT: Array | None = None,
) -> tuple[Array, Array]:
    """Reads tokens and returns what the model says of the targets, without all logits at once.

    Args:
      model, params: the model.
      tokens_BT: int32 inputs.
      targets_BT: int32, what is to be predicted at each place.
      ctx: the rest of the call.
      places_BT: int32, where the targets are predicted, of their shape, which then may be narrower
        than that of the tokens; None is at every token.

    Returns:
      (B, T) fp32 -ln p(target), and (B, T) booleans: whether the target is the likeliest token.
    """
    x_BTD, _ = model.apply({"params": params}, tokens_BT, ctx, method="hidden")
    if places_BT is not None:
        x_BTD = jnp.take_along_axis(x_BTD, places_BT[..., None], axis=1)
    B, T, _ = x_BTD.shape

    def of_chunk(chunk):
        x_BCD, targets_BC = chunk
        logits_BCV = model.apply({"params": params}, x_BCD, ctx, method="unembed")
        hits_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return token_nll(logits_BCV, targets_BC), hits_BC

    if T <= CHUNK:
        return of_chunk((x_BTD, targets_BT))
    room = -T % CHUNK

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, room)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, CHUNK, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, T + room)[:, :T]

    nll, hits = jax.lax.map(of_chunk, (split(x_BTD), split(targets_BT)))
    return join(nll), join(hits)


@partial(jax.jit, static_argnames="model")
def _score_rows(model, params, tokens_BT: Array, ctx: Context) -> Array:
    return predict(model, params, tokens_BT, jnp.roll(tokens_BT, -1, axis=1), ctx)[0]


@partial(jax.jit, static_argnames="model")
def _score_places(
    model, params, tokens_BT: Array, targets_BN: Array, places_BN: Array, ctx: Context
) -> tuple[Array, Array]:
    return predict(model, params, tokens_BT, targets_BN, ctx, places_BN)


@partial(jax.jit, static_argnames="model")
def _mean_rows(model, params, tokens_BT: Array, segments_BT: Array, ctx: Context) -> Array:
    if isinstance(model, EncoderDecoder):
        ctx = ctx.replace(source_segments_BS=segments_BT)
        x_BTD = model.apply({"params": params}, tokens_BT, ctx, method="encode")
    else:
        ctx = ctx.replace(segments_BT=segments_BT)
        x_BTD, _ = model.apply({"params": params}, tokens_BT, ctx, method="hidden")
    kept_BT1 = (segments_BT != 0)[..., None]
    total_BD = jnp.where(kept_BT1, x_BTD.astype(jnp.float32), 0.0).sum(axis=1)
    return total_BD / kept_BT1.sum(axis=1)
