"""What a model says of given text: how likely it is, and one vector for each."""

from collections.abc import Sequence
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
from lm.models.encdec import EncoderDecoder
from lm.ops.loss import token_nll

Array = jax.Array
CHUNK = 128  # Places whose logits are in memory at a time.


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

    Raises:
      ValueError: if a text is too long, there is nothing to predict in it, or the model is
        bidirectional.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if not model.causal:
        raise ValueError(
            "a bidirectional model gives no likelihood to a text: score with a causal one"
        )
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
    scores: list[Score] = [Score(0.0, 0.0, 0)] * len(rows)
    for group in groups(rows, batch_size):
        some, count = rows_at(rows, group), bucket(len(group))
        tokens, segments = pack(some, width_of(some, model), count)
        ctx = Context(segments_BT=segments, dtype=dtype)
        if has_encoder:
            source = rows_at(sources, group)
            source_tokens, source_segments = pack(source, width_of(source, model), count)
            ctx = ctx.replace(source_BS=source_tokens, source_segments_BS=source_segments)
        nll = np.asarray(_score_rows(model, loaded.params, tokens, ctx), np.float64)
        for row, index in enumerate(group):
            # Column t is about token t + 1.
            found = -nll[row, contexts[index] - 1 : len(rows[index]) - 1]
            scores[index] = Score(float(found.sum()), float(found.mean()), len(found))
    return scores


def embed(
    loaded: Any, texts: Sequence[str], *, batch_size: int = 32, dtype: str = "float32"
) -> np.ndarray:
    """Returns the mean over each text's places of the last hidden states, (num_texts, D) fp32.

    The start token is one of the places, and so is the end of what a bidirectional model reads.
    An encoder-decoder's are those of its encoder.

    Args: as of `score`.

    Raises:
      ValueError: if a text is too long, or has no token at all.
    """
    model = loaded.model
    if isinstance(model, EncoderDecoder):
        read = encode_source
    else:
        read = encode if model.causal else encode_both_ends
    rows = [read(loaded.tokenizer, text) for text in texts]
    check(rows, model, "text")
    vectors = [np.zeros(0)] * len(rows)
    for group in groups(rows, batch_size):
        some = rows_at(rows, group)
        tokens, segments = pack(some, width_of(some, model), bucket(len(group)))
        means = np.asarray(_mean_rows(model, loaded.params, tokens, segments, dtype))
        for row, index in enumerate(group):
            vectors[index] = means[row]
    return np.stack(vectors)


def groups(rows: Rows, batch_size: int) -> list[list[int]]:
    """Returns the rows' numbers in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def rows_at(rows: Rows, group: Sequence[int]) -> Rows:
    return [rows[index] for index in group]


def predict(
    model: Any, params: Any, tokens_BT: Array, targets_BT: Array, ctx: Context
) -> tuple[Array, Array]:
    """Reads tokens and returns what the model says of the targets, without all logits at once.

    Args:
      model, params: the model.
      tokens_BT: int32 inputs.
      targets_BT: int32, what is to be predicted at each place.
      ctx: the rest of the call.

    Returns:
      (B, T) fp32 -ln p(target), and (B, T) booleans: whether the target is the likeliest token.
    """
    x_BTD, _ = model.apply({"params": params}, tokens_BT, ctx, method="hidden")
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


@partial(jax.jit, static_argnames=("model", "dtype"))
def _mean_rows(model, params, tokens_BT: Array, segments_BT: Array, dtype: str) -> Array:
    if isinstance(model, EncoderDecoder):
        ctx = Context(source_segments_BS=segments_BT, dtype=dtype)
        x_BTD = model.apply({"params": params}, tokens_BT, ctx, method="encode")
    else:
        ctx = Context(segments_BT=segments_BT, dtype=dtype)
        x_BTD, _ = model.apply({"params": params}, tokens_BT, ctx, method="hidden")
    kept_BT1 = (segments_BT != 0)[..., None]
    total_BD = jnp.where(kept_BT1, x_BTD.astype(jnp.float32), 0.0).sum(axis=1)
    return total_BD / kept_BT1.sum(axis=1)
