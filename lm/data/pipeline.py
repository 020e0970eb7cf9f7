"""The Grain pipeline: examples to batches, in one global order with one global position.

Global batch k is a pure function of the examples, the seed and k. Process p of n makes rows
[p B/n, (p+1) B/n) of it and nothing else. A position is therefore one number, it is restored
without replaying anything, and it survives another number of processes.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args

import grain
import numpy as np

from lm.core.batch import Batch
from lm.data.example import Corpus, Example, check_ids

Layout = Literal["rows", "pack", "fit"]
Row = dict[str, Any]


def permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the (num,) order of an epoch, int64.

    NumPy promises the stream of a bit generator for ever, and that of `Generator.permutation` not.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num)
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True)
class Order:
    """Which item comes when: every epoch has all of them, shuffled anew or as they are."""

    num_items: int
    seed: int
    shuffle: bool

    def epoch(self, epoch: int) -> np.ndarray:
        if self.shuffle:
            return permutation(self.num_items, self.seed, epoch)
        return np.arange(self.num_items)


class Rows(Protocol):
    """A way to lay out documents: a number of rows an epoch, and any row of any epoch."""

    num_rows: int

    def row(self, epoch: int, index: int) -> Row: ...


class OnePerRow:
    """One document a row, cut or filled to the length, as teenyGPT reads headlines."""

    def __init__(self, examples: Sequence[Example], order: Order, length: int):
        self.examples, self.length = examples, length
        self.num_rows = len(examples)
        self._order = functools.lru_cache(2)(order.epoch)

    def row(self, epoch: int, index: int) -> Row:
        example = self.examples[int(self._order(epoch)[index])]
        row = empty_row(self.length)
        _place(row, example, slice(0, min(len(example.tokens) - 1, self.length)), 0, 1)
        if example.source is not None:
            row["source"] = example.source
        if example.label is not None:
            row["labels"] = np.int32(example.label)
        return row


class Packed:
    """Documents end to end, cut every `length` places: no padding but at the end of an epoch.

    A document of T+1 tokens is T pairs (token, next token); the pairs are what is laid end to end,
    so a target never belongs to another document and no place is lost to a separator. A document
    cut by the end of a row goes on in the next as a segment of its own, its positions from 0.
    """

    def __init__(self, examples: Sequence[Example], order: Order, length: int):
        self.examples, self.length, self.order = examples, length, order
        self.lengths = num_pairs(examples)
        self.num_rows = -(-int(self.lengths.sum()) // length)
        self._plan = functools.lru_cache(2)(self._make_plan)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = self.order.epoch(epoch)
        return order, np.concatenate([[0], np.cumsum(self.lengths[order])])

    def row(self, epoch: int, index: int) -> Row:
        order, starts = self._plan(epoch)
        begin, row = index * self.length, empty_row(self.length)
        end = min(begin + self.length, int(starts[-1]))
        first = int(np.searchsorted(starts, begin, "right")) - 1
        last = int(np.searchsorted(starts, end, "left"))
        for segment, n in enumerate(range(first, last), 1):
            start, stop = max(begin, int(starts[n])), min(end, int(starts[n + 1]))
            part = slice(start - int(starts[n]), stop - int(starts[n]))
            _place(row, self.examples[int(order[n])], part, start - begin, segment)
        return row


class Fitted:
    """Whole documents, as many as fit a row: hardly any padding, and no context is lost to a cut.

    The rows are made once, by best-fit decreasing, and an epoch shuffles them. A document longer
    than a row is cut into full ones, each piece a segment of its own, its positions from 0.
    """

    def __init__(self, examples: Sequence[Example], order: Order, length: int):
        self.examples, self.length = examples, length
        lengths = num_pairs(examples)
        pieces = -(-lengths // length)
        self.documents = np.repeat(np.arange(len(lengths)), pieces)
        begins = np.cumsum(pieces) - pieces
        self.starts = (np.arange(pieces.sum()) - np.repeat(begins, pieces)) * length
        self.sizes = np.minimum(lengths[self.documents] - self.starts, length)
        self.rows = best_fit(self.sizes, length)
        self.num_rows = len(self.rows)
        self._order = functools.lru_cache(2)(replace(order, num_items=self.num_rows).epoch)

    def row(self, epoch: int, index: int) -> Row:
        row, at = empty_row(self.length), 0
        for segment, piece in enumerate(self.rows[int(self._order(epoch)[index])], 1):
            start, size = int(self.starts[piece]), int(self.sizes[piece])
            example = self.examples[int(self.documents[piece])]
            _place(row, example, slice(start, start + size), at, segment)
            at += size
        return row


def best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items into few bins, each into the fullest bin that has room, the largest items first.

    Args:
      sizes: (num_items,) integers from 1 to `capacity`.
      capacity: of every bin.

    Returns:
      The numbers of the items in each bin.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # Bit r is set where a bin with room r is; the lowest bit that suffices is the best.
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        room = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
        if fitting:
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            number = len(bins)
            bins.append([])
        bins[number].append(item)
        with_room[room - size].append(number)
        rooms |= 1 << (room - size)
    return bins


LAYOUTS = {"rows": OnePerRow, "pack": Packed, "fit": Fitted}


def num_pairs(examples: Sequence[Example]) -> np.ndarray:
    """Returns the (num_documents,) number of predictions in each document."""
    if isinstance(examples, Corpus):
        return np.diff(examples.tokens.offsets) - 1
    return np.array([len(example.tokens) - 1 for example in examples], np.int64)


def empty_row(length: int) -> Row:
    """Returns a row of padding."""
    row = {
        name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments", "positions")
    }
    return {**row, "weights": np.zeros(length, np.float32)}


def _place(row: Row, example: Example, part: slice, at: int, segment: int) -> None:
    """Writes a part of a document's (token, next token) pairs into a row, from place `at` on."""
    size = part.stop - part.start
    to, following = slice(at, at + size), slice(part.start + 1, part.stop + 1)
    row["tokens"][to] = example.tokens[part]
    row["targets"][to] = example.tokens[following]
    row["weights"][to] = 1 if example.weights is None else example.weights[following]
    row["segments"][to] = segment
    row["positions"][to] = np.arange(size)


@dataclass(frozen=True)
class Position:
    """Where a loader stands, and what must not change for that to mean anything.

    Attributes:
      step: the number of the next global batch, from 0.
      seed, batch_size, num_rows, layout, length: the loader's.
    """

    step: int
    seed: int
    batch_size: int
    num_rows: int
    layout: str
    length: int


@dataclass(frozen=True)
class _Batches:
    """Random access to one process's share of the global batches, for Grain."""

    rows: Rows
    batch_size: int
    share: range
    epochs: int | None
    length: int
    pad_id: int
    source_length: int | None
    labelled: bool

    def __len__(self) -> int:
        if self.epochs is None:
            return sys.maxsize
        return -(-self.epochs * self.rows.num_rows // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        rows = []
        for n in self.share:
            epoch, index = divmod(step * self.batch_size + n, self.rows.num_rows)
            over = self.epochs is not None and epoch >= self.epochs
            rows.append(empty_row(self.length) if over else self.rows.row(epoch, index))
        sources = [row.pop("source", None) for row in rows]
        labels = [row.pop("labels", None) for row in rows]
        fields: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        padding = fields["segments"] == 0
        fields["tokens"][padding] = self.pad_id
        fields["targets"][padding] = self.pad_id
        if self.labelled:
            # A row of padding gets some label, and counts nothing.
            fields["labels"] = np.array([label or 0 for label in labels], np.int32)
        return Batch(**fields, **self._sources(sources))

    def _sources(self, sources: list[np.ndarray | None]) -> dict[str, np.ndarray]:
        if self.source_length is None:
            return {}
        tokens = np.full((len(sources), self.source_length), self.pad_id, np.int32)
        segments = np.zeros_like(tokens)
        for n, source in enumerate(sources):
            if source is not None:
                size = min(len(source), self.source_length)
                tokens[n, :size], segments[n, :size] = source[:size], 1
        return {"source": tokens, "source_segments": segments}


class Loader(Iterator[Batch]):
    """An iterator over one process's share of the global batches, read ahead by Grain's threads.

    Attributes:
      num_batches: from the first to the last, or None if there is no last.
    """

    def __init__(self, batches: _Batches, position: Position, prefetch: int):
        self.num_batches = None if batches.epochs is None else len(batches)
        self._position = position
        options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._seek(position.step)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON: {'step': the next global batch, ...}."""
        step = self._iterator.get_state()["next_index"]
        return {**asdict(self._position), "step": step}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at a position that `state` returned, for any number of processes.

        Raises:
          ValueError: another seed, batch size, layout, length or number of rows, so that the
            position would name other data.
        """
        here = asdict(self._position)
        if state.keys() != here.keys():
            raise ValueError(f"A data position has the fields {sorted(here)}, not {sorted(state)}.")
        for name, value in here.items():
            if name != "step" and state[name] != value:
                raise ValueError(
                    f"The data position was saved with {name}={state[name]!r}, and this run has "
                    f"{value!r}: restore it with the same data settings."
                )
        self._seek(state["step"])

    def _seek(self, step: int) -> None:
        self._iterator.set_state({"next_index": step})


def make_loader(
    examples: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    layout: Layout = "rows",
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    vocab_size: int | None = None,
    pad_id: int = 0,
    source_length: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
    prefetch: int = 2,
) -> Loader:
    """Returns an iterator of numpy batches, (B / process_count, length) each.

    For evaluation use `shuffle=False, epochs=1`: every row once, in order, the last batch filled
    with rows of weight 0. Training (`epochs=None`) runs on from one epoch into the next.

    Args:
      examples: random access to documents, a `Corpus` or any sequence of `Example`.
      batch_size: rows of the global batch, B.
      length: places of a row, T.
      layout: 'rows' for one document a row, the rest of a longer one left out; 'pack' for documents
        end to end, going on in the next row; 'fit' for whole documents, as many as fit a row.
      seed: of the order, a different one for each epoch.
      shuffle: whether to shuffle at all.
      epochs: passes over the examples, or None for no end.
      vocab_size: the model's, to check the ids against; None to trust them.
      pad_id: what fills tokens and targets where segments are 0.
      source_length: places for an encoder-decoder's source, S; longer sources are cut.
      process_index, process_count: which rows of the global batch are made here.
      start: the first global batch.
      prefetch: batches made ahead.

    Raises:
      ValueError: no examples, a batch that the processes cannot share evenly, a length below 1, an
        unknown layout, ids out of range, or sources with no `source_length` or another layout than
        'rows'.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout should be one of {get_args(Layout)}, not {layout!r}.")
    if not len(examples):
        raise ValueError("The split is empty: choose a split or a corpus with examples.")
    if min(length, batch_size, prefetch) < 1 or min(seed, start) < 0:
        raise ValueError(
            "batch_size, length and prefetch should be 1 or more, and seed and start 0 or more: "
            f"they are {batch_size}, {length}, {prefetch}, {seed} and {start}."
        )
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"{process_count} processes should share a batch evenly, and batch_size is "
            f"{batch_size} (this is process {process_index}): choose a multiple of "
            f"{process_count}."
        )
    has_source = examples[0].source is not None
    if has_source != (source_length is not None) or (has_source and layout != "rows"):
        raise ValueError(
            "Examples with a source need source_length and the layout 'rows', and examples without "
            f"one take no source_length: it is {source_length}, and the layout is {layout!r}."
        )
    labelled = examples[0].label is not None
    if labelled and layout != "rows":
        raise ValueError(f"Examples with a label need the layout 'rows', not {layout!r}.")
    if vocab_size is not None:
        _check_vocabulary(examples, vocab_size)
    rows = LAYOUTS[layout](examples, Order(len(examples), seed, shuffle), length)
    share = batch_size // process_count
    mine = range(process_index * share, (process_index + 1) * share)
    batches = _Batches(rows, batch_size, mine, epochs, length, pad_id, source_length, labelled)
    position = Position(start, seed, batch_size, rows.num_rows, layout, length)
    return Loader(batches, position, prefetch)


def _check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    if isinstance(examples, Corpus):
        check_ids(examples.tokens.flat, vocab_size)
        if examples.sources is not None:
            check_ids(examples.sources.flat, vocab_size)
        return
    for example in examples:
        check_ids(np.asarray(example.tokens), vocab_size)
        if example.source is not None:
            check_ids(np.asarray(example.source), vocab_size)
