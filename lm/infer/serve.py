"""Continuous batching: rows decode together, and each goes to a waiting prompt once it is free."""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.core.context import Context
from lm.infer.decoding import CACHED, Prompt, admit, finish, idle, lay_apart
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
from lm.infer.rows import bucket, check, pack
from lm.models.adapter_rows import Adapters, choose, num_adapters
from lm.models.encdec import EncoderDecoder
from lm.ops.sampling import Sampling


class Finished(NamedTuple):
    """The new tokens of one prompt, and how long they took.

    Attributes:
      index: number of the prompt, as `Batcher.submit` returned it.
      tokens: the new ones, a stop token included.
      waited: seconds until it had a row.
      first_token: seconds from then to its first token.
      seconds: from then to its last.
      text: that of the tokens without the stop token, from `generate_many`.
    """

    index: int
    tokens: list[int]
    waited: float
    first_token: float
    seconds: float
    text: str = ""


@dataclasses.dataclass
class Request:
    """A prompt that waits, or has a row."""

    index: int
    prompt: Sequence[int]
    key_data_1K: Any
    sampling: Sampling
    limit: int
    adapter_B: np.ndarray | None
    submitted: float
    admitted: float = 0.0
    first: float = 0.0
    tokens: list[int] = dataclasses.field(default_factory=list)

    def finished(self) -> Finished:
        waited, first = self.admitted - self.submitted, self.first - self.admitted
        seconds = time.perf_counter() - self.admitted
        return Finished(self.index, self.tokens, waited, first, seconds)


class Batcher:
    """B rows of one compiled loop; whoever waits gets the first row that is free.

    All rows are at the same place of their caches, which go round (`lm.layers.cache`): a prompt is
    read just before that place, whatever its length, and the rest of its row is padding. A prompt's
    tokens are those of `generate_tokens` with the same key. One program is compiled for the loop,
    and one for each `bucket` of prompt lengths.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        slots: int,
        prompt_length: int,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        dtype: str = "float32",
        cache_dtype: str | None = None,
        chunk: int = 32,
    ):
        """Makes the rows, all free.

        Args:
          model: a causal model that is no encoder-decoder.
          params: its parameters.
          slots: B, prompts that are continued at the same time.
          prompt_length: most tokens of a prompt.
          max_new_tokens: most that are drawn for one.
          stop_ids: tokens that end a row.
          dtype, cache_dtype: as of `generate_tokens`.
          chunk: steps between two looks of the host at what was drawn. With prompts waiting, the
            host also looks as soon as a row is free.

        Raises:
          ValueError: for an encoder-decoder, or a number below 1.
        """
        check_decoder(model)
        check_cache_dtype(cache_dtype)
        numbers = dict(slots=slots, prompt_length=prompt_length, max_new_tokens=max_new_tokens)
        for name, number in {**numbers, "chunk": chunk}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")
        self.model, self.params = model, lay_apart(model, params, dtype)
        self.prompt_length, self.max_new_tokens = prompt_length, max_new_tokens
        self.room = chunk + 1
        most = bucket(prompt_length, least=16)
        self.widest = most if model.max_length is None else min(most, model.max_length)
        length = self.widest + bucket(max_new_tokens, least=16)
        self.ctx = Context(dtype=dtype, cache_dtype=cache_dtype)
        self.choose = partial(choose, params, rows=1)
        self.adapter_B = np.full(slots, -1, np.int32) if num_adapters(params)[1] else None
        self.decoding = idle(
            model,
            self.params,
            slots,
            stop_rows(stop_ids),
            self.ctx.replace(cache_length=length, adapter_B=self.adapter_B),
            np.int32(self.widest),
        )
        self.waiting: collections.deque[Request] = collections.deque()
        self.rows: list[Request | None] = [None] * slots
        self.count = 0

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        key: jax.Array | None = None,
        adapter: int | None = None,
        **settings: Setting,
    ) -> int:
        """Lets a prompt wait for a row; returns its number.

        Args:
          prompt: token ids.
          max_new_tokens: at most that many; None is as many as the rows have room for.
          seed: it draws with `fold_in(key(seed), 0)`, as the only prompt of `generate_tokens` does.
          key: a typed PRNG key instead.
          adapter: which of several adapters it uses, -1 for the base alone.
          settings: of `Sampling`, one number each.

        Raises:
          ValueError: as `generate_tokens`; or if the rows have no room for it.
        """
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        key_data_1K = key_rows(seed, None if key is None else key.reshape(1), 1, 1)
        return self.enqueue(prompt, limit, key_data_1K, Sampling(**settings), adapter)

    def enqueue(
        self,
        prompt: Sequence[int],
        limit: int,
        key_data_1K: Any,
        sampling: Sampling,
        adapter: int | None = None,
    ) -> int:
        """As `submit`, with the key's data and the settings as they are."""
        if not 1 <= limit <= self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is from 1 to {self.max_new_tokens}, for which these rows have "
                f"room, and not {limit}"
            )
        check([prompt], self.model, room=limit)
        if len(prompt) > self.prompt_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and these rows have room for "
                f"{self.prompt_length}: make them with a larger prompt_length"
            )
        if adapter is not None and self.adapter_B is None:
            raise ValueError(
                "a prompt of a batch chooses among several adapters: open them together with "
                "lm.load(path, adapter=(...))"
            )
        request = Request(
            self.count,
            prompt,
            key_data_1K,
            sampling_rows(sampling, 1, 1),
            limit,
            self.choose(adapter),
            time.perf_counter(),
        )
        self.waiting.append(request)
        self.count += 1
        return request.index

    def run(self) -> Iterator[Finished]:
        """Yields what is finished, in that order, until nothing waits and every row is free.

        More may be submitted meanwhile.
        """
        while self.waiting or any(self.rows):
            for row in range(len(self.rows)):
                # A prompt may be finished with its first token, and its row free again.
                while self.waiting and self.rows[row] is None:
                    yield from self._admit(row)
            if any(self.rows):
                yield from self._advance()

    def _admit(self, row: int) -> Iterator[Finished]:
        request = self.rows[row] = self.waiting.popleft()
        request.admitted = time.perf_counter()
        width = min(bucket(len(request.prompt), least=16), self.widest)
        if self.adapter_B is not None and request.adapter_B is not None:
            self.adapter_B[row] = request.adapter_B[0]
        self.decoding = admit(
            self.model,
            self.params,
            self.decoding,
            np.int32(row),
            Prompt(*pack([request.prompt], width, 1, left=True)),
            request.key_data_1K,
            request.sampling,
            np.full(1, request.limit, np.int32),
            self.ctx.replace(adapter_B=request.adapter_B),
        )
        tokens_B1 = np.array(self.decoding.last_B)[:, None]
        request.first = time.perf_counter()
        yield from self._take(tokens_B1, [row])

    def _advance(self) -> Iterator[Finished]:
        tokens_BN, self.decoding = finish(
            self.model,
            self.params,
            self.decoding,
            self.ctx.replace(adapter_B=self.adapter_B),
            CACHED,
            self.room,
            np.int32(self.room - 1),
            np.bool_(len(self.waiting) > 0),
        )
        taken = [row for row, request in enumerate(self.rows) if request is not None]
        yield from self._take(np.array(tokens_BN)[:, 1:], taken)

    def _take(self, tokens_BN: np.ndarray, rows: Sequence[int]) -> Iterator[Finished]:
        """Gives rows what was drawn for them, and yields and frees those that are finished."""
        lengths_B, finished_B = map(np.array, (self.decoding.lengths_B, self.decoding.finished_B))
        for row in rows:
            request = self.rows[row]
            request.tokens += tokens_BN[row, : lengths_B[row] - len(request.tokens)].tolist()
            if finished_B[row]:
                self.rows[row] = None
                yield request.finished()


def generate_many(
    loaded: Any,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    slots: int = 8,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    keys: jax.Array | None = None,
    adapters: Adapters = None,
    dtype: str = "float32",
    cache_dtype: str | None = None,
    chunk: int = 32,
    only: Sequence[int] | None = None,
    **settings: Setting,
) -> Iterator[Finished]:
    """Yields what follows each of many prompts as soon as it is finished, `slots` at a time.

    The texts are those of `generate` for all of the prompts at once.

    Args:
      loaded: has `.model`, `.params` and `.tokenizer`.
      prompts: texts or conversations, as of `generate`.
      max_new_tokens, stop_ids, seed, keys, adapters, settings: as there.
      slots, dtype, cache_dtype, chunk: as of `Batcher`.
      only: numbers of the prompts to continue, the others being there already; None is all.

    Raises:
      ValueError: as `generate` and `Batcher`, before anything is read.
    """
    check_decoder(loaded.model)
    stop_ids = stops(loaded.tokenizer, stop_ids, prompts)
    rows = encoded(loaded, prompts)["prompts"] or []
    check(rows, loaded.model, room=max_new_tokens)
    count = len(rows)
    key_data = np.asarray(key_rows(seed, keys, count, bucket(count)))
    sampling = sampling_rows(Sampling(**settings), count, count)
    choices = choose(loaded.params, adapters, count)
    batcher = Batcher(
        loaded.model,
        loaded.params,
        slots=min(slots, count),
        prompt_length=max(map(len, rows)),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        dtype=dtype,
        cache_dtype=cache_dtype,
        chunk=chunk,
    )
    numbers = range(count) if only is None else only
    for index in numbers:
        batcher.enqueue(
            rows[index],
            max_new_tokens,
            key_data[index : index + 1],
            jax.tree.map(itemgetter(index), sampling),
            None if choices is None else int(choices[index]),
        )
    for finished in batcher.run():
        kept = [token for token in finished.tokens if token not in stop_ids]
        text = loaded.tokenizer.decode(kept)
        yield finished._replace(index=numbers[finished.index], text=text)


def check_decoder(model: Any) -> None:
    """Refuses an encoder-decoder."""
    if isinstance(model, EncoderDecoder):
        raise ValueError(
            "the rows of an encoder-decoder cannot be given to other prompts, since they are as "
            "wide as its sources: use lm.generate"
        )
