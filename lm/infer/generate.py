"""Generation: prompts in, tokens or text out; whole, or streamed as they are drawn."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.context import Context
from lm.infer.decoding import (
    CACHED,
    RECOMPUTE,
    Decoding,
    Prompt,
    Reader,
    finish,
    lay_apart,
    start,
    step,
)
from lm.infer.request import (
    Setting,
    Text,
    check_cache_dtype,
    encoded,
    key_rows,
    sampling_rows,
    stop_rows,
    stops,
)
from lm.infer.rows import Rows, bucket, check, pack, width_of
from lm.models.adapter_rows import Adapters, choose
from lm.models.encdec import EncoderDecoder
from lm.ops.sampling import Sampling


class Generated(NamedTuple):
    """New tokens of each prompt.

    Attributes:
      tokens: (B, N) int32, padded; a stop token is included.
      lengths: (B,) int32, how many of each row count.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def rows(self) -> list[list[int]]:
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths)]


class Speed(NamedTuple):
    """How long a call took.

    Attributes:
      first_token: seconds until every prompt had its first token. The first call of a shape
        compiles its program, and this counts it.
      seconds: for the rest, without compiling.
      tokens: drawn in those.
    """

    first_token: float
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return (
            f"{self.first_token:.2f} s to the first token, "
            f"then {self.tokens_per_second:,.1f} tokens/s"
        )


def generate_tokens(
    model: Any,
    params: Any,
    prompts: Rows | None = None,
    *,
    max_new_tokens: int,
    temperature: Setting = 1.0,
    top_k: Setting = 0,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    repetition_penalty: Setting = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    keys: jax.Array | None = None,
    source: Rows | None = None,
    adapters: Adapters = None,
    pad_id: int = 0,
    cache: bool = True,
    cache_dtype: str | None = None,
    dtype: str = "float32",
    report: Callable[[Speed], Any] | None = None,
) -> Generated:
    """Continues every prompt until it meets a stop token or has `max_new_tokens` more.

    Token i of prompt b is argmax(filtered logits / temperature + Gumbel(fold_in(key_b, i))), so
    a key's text does not depend on the rest of the batch, on padding, or on `cache`.

    Args:
      model: a causal model.
      params: its parameters.
      prompts: token ids, of any lengths. Of an encoder-decoder: how its outputs begin, after the
        start token, which is put before them; None, as usual, is not at all.
      max_new_tokens: at least 1.
      temperature, top_k, top_p, min_p, repetition_penalty: one number, or one per prompt; see
        `Sampling`. Temperature 0 takes the likeliest token.
      stop_ids: tokens that end a row.
      seed: prompt b draws with `fold_in(key(seed), b)`.
      keys: (B,) typed PRNG keys instead of a seed, one per prompt.
      source: token ids for the encoder of an encoder-decoder.
      adapters: which of the model's adapters continues a prompt, -1 for the base alone: one
        number, or one per prompt. Other numbers are the same compiled program. None where there
        is one adapter for all, or none.
      pad_id: fills the rows of the result that ended early.
      cache: False reads the whole row again for every token: slow, for tests and for models
        without a decoding state.
      cache_dtype: 'float32', 'bfloat16' or 'int8', what keys and values are kept in; None is the
        compute dtype. A smaller one rounds them, and the text may come out another.
      dtype: the compute dtype.
      report: is told how fast it was, such as `print`.

    Returns:
      The new tokens.

    Raises:
      ValueError: if a prompt is empty, too long, or has an id out of range; if a setting is out of
        range; if there is a source and no encoder, or the reverse; if there is no adapter of a
        number, or several and none is chosen.
    """
    began = time.perf_counter()
    decoding, call = _begin(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        seed=seed,
        keys=keys,
        source=source,
        adapters=adapters,
        cache=cache,
        cache_dtype=cache_dtype,
        dtype=dtype,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    draw = partial(finish, model, call.params, ctx=call.ctx, reader=call.reader, room=call.room)
    if report is not None:
        jax.block_until_ready(decoding.last_B)
        first_token = time.perf_counter() - began
        _, decoding = draw(decoding, steps=np.int32(0), waiting=np.False_)  # It only compiles.
        began = time.perf_counter()
    tokens, decoding = draw(decoding, steps=np.int32(call.room), waiting=np.False_)
    tokens, lengths = jax.device_get((tokens, decoding.lengths_B))
    if report is not None:
        later = int(lengths.sum()) - call.count
        report(Speed(first_token, time.perf_counter() - began, later))
    tokens = tokens[: call.count, :max_new_tokens]
    lengths = lengths[: call.count]
    valid = np.arange(max_new_tokens) < lengths[:, None]
    return Generated(np.where(valid, tokens, np.int32(pad_id)), lengths)


def stream_tokens(
    model: Any, params: Any, prompt: Sequence[int], *, max_new_tokens: int, **options: Any
) -> Iterator[int]:
    """Yields the tokens of `generate_tokens` for one prompt as they are drawn.

    Args:
      prompt: token ids.
      options: those of `generate_tokens`, with `source` one row of ids.
    """
    if options.get("source") is not None:
        options["source"] = [options["source"]]
    decoding, call = _begin(model, params, [prompt], max_new_tokens=max_new_tokens, **options)
    for index in range(max_new_tokens):
        # The next token is under way before this one is read, so that the device never waits.
        token, finished = jnp.copy(decoding.last_B), jnp.copy(decoding.finished_B)
        if index + 1 < max_new_tokens:
            decoding = step(model, call.params, decoding, call.ctx, call.reader)
        yield int(token[0])
        if finished[0]:
            return


def generate_until(
    model: Any,
    params: Any,
    prompts: Rows | None = None,
    *,
    done: Callable[[list[int]], bool],
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """Returns the tokens of `generate_tokens`, each row only until `done` says that it is whole.

    The rows are looked at on the host, so that it may be any condition, such as a string that
    several tokens spell.

    Args:
      model, params, prompts: as of `generate_tokens`.
      done: is given the new tokens of a row.
      max_new_tokens: at most that many tokens each.
      options: those of `generate_tokens`.
    """
    decoding, call = _begin(model, params, prompts, max_new_tokens=max_new_tokens, **options)
    rows: list[list[int]] = [[] for _ in range(call.count)]
    unfinished = set(range(call.count))
    for index in range(max_new_tokens):
        # The next tokens are under way before these are read.
        tokens_B, finished_B = jnp.copy(decoding.last_B), jnp.copy(decoding.finished_B)
        if index + 1 < max_new_tokens:
            decoding = step(model, call.params, decoding, call.ctx, call.reader)
        tokens_B, finished_B = jax.device_get((tokens_B, finished_B))
        for row in sorted(unfinished):
            rows[row].append(int(tokens_B[row]))
            if finished_B[row] or done(rows[row]):
                unfinished.remove(row)
        if not unfinished:
            break
    return rows


def generate(
    loaded: Any,
    prompts: str | Sequence[Text],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    **options: Any,
) -> list[str]:
    """Returns the text that follows each prompt; the tokenizer's end token stops it.

    Args:
      loaded: has `.model`, `.params` and `.tokenizer`.
      prompts: texts; one string counts as one prompt. They follow the tokenizer's start token, if
        it has one. For an encoder-decoder they are what the encoder reads. Or conversations, each a
        list of messages with 'role' and 'content': what follows is the next reply, as the chat
        template has it, up to the token that ends its turn.
      max_new_tokens: at most that many tokens each.
      stop_ids: further tokens that end a text; they are not part of it.
      options: those of `generate_tokens`.

    Raises:
      ValueError: as `generate_tokens`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    stop_ids = stops(loaded.tokenizer, stop_ids, prompts)
    new = generate_tokens(
        loaded.model,
        loaded.params,
        **encoded(loaded, prompts),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        **options,
    )
    return [
        loaded.tokenizer.decode([token for token in row if token not in stop_ids])
        for row in new.rows()
    ]


def stream(
    loaded: Any,
    prompt: Text,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    **options: Any,
) -> Iterator[str]:
    """Yields the text of `generate` for one prompt, piece by piece; arguments as there."""
    stop_ids = stops(loaded.tokenizer, stop_ids, [prompt])
    rows = {name: value and value[0] for name, value in encoded(loaded, [prompt]).items()}
    tokens = stream_tokens(
        loaded.model,
        loaded.params,
        rows.pop("prompts") or (),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        **rows,
        **options,
    )
    return pieces(loaded.tokenizer, (token for token in tokens if token not in stop_ids))


def pieces(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Yields the text of tokens as soon as it is certain; joined, it is the text of them all.

    A token may hold part of a character only, which decodes to U+FFFD until the rest has come.
    Each piece is decoded with the tokens of the piece before it, so that spaces between tokens
    come out as in the whole, and the cost does not grow with the length of the text.
    """
    before: list[int] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        old, new = tokenizer.decode(before), tokenizer.decode(before + pending)
        if len(new) > len(old) and not new.endswith("\N{REPLACEMENT CHARACTER}"):
            yield new[len(old) :]
            before, pending = pending, []
    if pending:
        rest = tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]
        if rest:
            yield rest


class _Call(NamedTuple):
    params: Any
    ctx: Context
    reader: Reader
    room: int
    count: int


def _begin(
    model: Any,
    params: Any,
    prompts: Rows | None,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    keys: jax.Array | None = None,
    source: Rows | None = None,
    adapters: Adapters = None,
    cache: bool = True,
    cache_dtype: str | None = None,
    dtype: str = "float32",
    **settings: Setting,
) -> tuple[Decoding, _Call]:
    """Checks and packs everything, reads the prompts and draws the first tokens."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    rows = _with_start(model, prompts, source)
    check(rows, model, room=max_new_tokens)
    count = bucket(len(rows))
    adapter_B = choose(params, adapters, len(rows))
    if adapter_B is not None:
        adapter_B = np.pad(adapter_B, (0, count - len(rows)), constant_values=-1)
    if cache:
        width, room = width_of(rows, model), bucket(max_new_tokens, least=16)
        if model.max_length is not None:
            room = min(room, model.max_length)
        slots = width + room
    else:
        longest = max(len(row) for row in rows)
        width = width_of([range(longest + max_new_tokens)], model)
        room, slots = width, None
    arrays = pack(rows, width, count, left=cache)
    if source is not None:
        arrays += pack(source, width_of(source, model), count)
    check_cache_dtype(cache_dtype)
    ctx = Context(dtype=dtype, cache_length=slots, cache_dtype=cache_dtype, adapter_B=adapter_B)
    reader = CACHED if cache else RECOMPUTE
    params = lay_apart(model, params, dtype)
    decoding = start(
        model,
        params,
        Prompt(*arrays),
        key_rows(seed, keys, len(rows), count),
        sampling_rows(Sampling(**settings), len(rows), count),
        stop_rows(stop_ids),
        np.where(np.arange(count) < len(rows), np.int32(max_new_tokens), 0),
        ctx,
        reader,
    )
    return decoding, _Call(params, ctx, reader, room, len(rows))


def _with_start(model: Any, prompts: Rows | None, source: Rows | None) -> Rows:
    """Returns what the decoder reads, after checking the source of an encoder-decoder."""
    if not isinstance(model, EncoderDecoder):
        if source is not None:
            raise ValueError("this model has no encoder: give prompts, and no source")
        return prompts or []
    if source is None:
        raise ValueError("this model is an encoder-decoder: give the source that it is to read")
    check(source, model, "source")
    prompts = [()] * len(source) if prompts is None else prompts
    if len(prompts) != len(source):
        raise ValueError(f"there are {len(source)} sources and {len(prompts)} prompts: give pairs")
    return [[model.start_id, *row] for row in prompts]
