"""What `lm data inspect` and `lm tokenizer train` do, as functions."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from lm.core.batch import Batch
from lm.data.example import Example, tokenize
from lm.data.pipeline import LAYOUTS, Layout, Order, make_loader, num_pairs
from lm.data.source import Source
from lm.data.tokenizer import (
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
    Unknown,
    teeny_gpt_tokenizer,
    train_bpe,
    train_chars,
    train_wordpiece,
)

Kind = Literal["chars", "teeny_gpt", "bpe", "wordpiece"]


def statistics(examples: Sequence[Example], length: int, layout: Layout) -> dict[str, float]:
    """Returns what an epoch of a layout holds, counted and not sampled.

    Args:
      examples: the documents.
      length: places of a row.
      layout: 'rows', 'pack' or 'fit'.

    Returns:
      documents; rows; predictions (places with a target); padding, the share of places without one;
      truncated, the documents cut short; dropped, the predictions cut off; documents_per_row.
    """
    lengths = num_pairs(examples)
    rows = LAYOUTS[layout](examples, Order(len(examples), 0, False), length).num_rows
    cut = np.maximum(lengths - length, 0) if layout == "rows" else np.zeros_like(lengths)
    predictions = int(lengths.sum() - cut.sum())
    return {
        "documents": len(examples),
        "rows": rows,
        "predictions": predictions,
        "padding": 1 - predictions / (rows * length),
        "truncated": int((cut > 0).sum()),
        "dropped": int(cut.sum()),
        "documents_per_row": len(examples) / rows,
    }


def describe_statistics(numbers: dict[str, float]) -> str:
    """Returns `statistics` as lines of text."""
    return "\n".join(
        f"{name.replace('_', ' '):>18}  "
        + (
            f"{value:.1%}"
            if name == "padding"
            else f"{value:,.6g}"
            if value % 1
            else f"{value:,.0f}"
        )
        for name, value in numbers.items()
    )


def describe_batch(batch: Batch, tokenizer: Tokenizer, num_rows: int = 4) -> str:
    """Returns the first rows of a batch as text, with their masks and segments.

    A mask is written by its runs: '1x36 0x114' is 36 places of weight 1 and then 114 of weight 0.
    """
    lines = []
    for n in range(min(num_rows, len(batch.tokens))):
        segments, weights = np.asarray(batch.segments[n]), np.asarray(batch.weights[n])
        lines.append(f"row {n}: segments {_runs(segments)}; weights {_runs(weights)}")
        if batch.source is not None and batch.source_segments is not None:
            source = np.asarray(batch.source[n])[np.asarray(batch.source_segments[n]) > 0]
            lines.append(f"  source: {tokenizer.decode(source)!r}")
        for segment in range(1, int(segments.max(initial=0)) + 1):
            places = np.flatnonzero(segments == segment)
            # The targets are the text; the inputs are it too, a place later.
            targets = np.asarray(batch.targets[n])[places]
            ends = " [end]" if targets[-1] == tokenizer.eos_id else ""
            lines.append(f"  {segment}: {tokenizer.decode(targets)!r}{ends}")
    padding = float(np.mean(np.asarray(batch.segments) == 0))
    lines.append(f"{batch.tokens.shape} places, padding {padding:.1%}")
    return "\n".join(lines)


def inspect_source(
    source: Source, tokenizer: Tokenizer, length: int, layout: Layout = "rows", num_rows: int = 4
) -> str:
    """Returns the statistics of a source and its first training rows, as text."""
    corpus = tokenize(source, tokenizer)
    shape: dict[str, Any] = {"batch_size": num_rows, "length": length, "layout": layout}
    source_length = length if source.source_field else None
    batch = next(make_loader(corpus, **shape, source_length=source_length))
    numbers = {"characters": corpus.num_chars, **statistics(corpus, length, layout)}
    return f"{describe_statistics(numbers)}\n\n{describe_batch(batch, tokenizer, num_rows)}"


def _runs(values: np.ndarray) -> str:
    starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
    counts = np.diff(starts, append=len(values))
    return " ".join(f"{values[i]:g}x{count}" for i, count in zip(starts, counts))


def train_tokenizer(
    kind: Kind, texts: Iterable[Any], vocab_size: int | None = None, unknown: Unknown = "raise"
) -> CharTokenizer | SubwordTokenizer:
    """Returns a tokenizer trained on texts.

    Args:
      kind: 'chars', 'teeny_gpt' (29 symbols, nothing to train), 'bpe' or 'wordpiece'.
      texts: strings, or a `Source`.
      vocab_size: of 'bpe' and 'wordpiece', which need one.
      unknown: what 'chars' does with a character that the texts lack.

    Raises:
      ValueError: an unknown kind, or a missing or needless vocabulary size.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"A tokenizer is one of {get_args(Kind)}, not {kind!r}.")
    if (vocab_size is not None) != (kind in ("bpe", "wordpiece")):
        raise ValueError(
            f"bpe and wordpiece need a vocab_size, and chars and teeny_gpt have their own: it is "
            f"{vocab_size} for {kind!r}."
        )
    strings = (text if isinstance(text, str) else text.text for text in texts)
    if kind == "chars":
        return train_chars(strings, unknown)
    if vocab_size is None:
        return teeny_gpt_tokenizer()
    return (train_bpe if kind == "bpe" else train_wordpiece)(strings, vocab_size)
