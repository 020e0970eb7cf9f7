"""`lm data inspect` and `lm tokenizer train`: what a model reads."""

import sys
from pathlib import Path

from tyro.conf import Positional

from lm.data.corpus import TextData
from lm.data.inspect import inspect_source
from lm.data.inspect import train_tokenizer as make_tokenizer
from lm.data.source import load_source
from lm.data.tokenizer import load_tokenizer


def inspect_data(
    source: Positional[str] = "headlines",
    tokenizer: str = "teeny_gpt",
    split: str = "train",
    length: int = 149,
    layout: str = "rows",
    num_rows: int = 4,
) -> None:
    """Shows rows of a data set as text, with masks, segments and statistics.

    Args:
      source: headlines, headlines/original, text:PATH or tfds:NAME.
      tokenizer: teeny_gpt, chars, bpe:SIZE, wordpiece:SIZE, or the path of a tokenizer.json.
      split: train, validation or test.
      length: places of a row.
      layout: rows, pack, or fit.
      num_rows: how many to show.
    """
    config = TextData(source, tokenizer, length, layout)  # pyright: ignore
    print(inspect_source(config.load(split), config.make_tokenizer(), length, layout, num_rows))


def train_tokenizer(
    source: Positional[str],
    out: str,
    kind: str = "bpe",
    vocab_size: int | None = 8192,
    split: str = "train",
) -> None:
    """Trains a tokenizer and writes its tokenizer.json.

    Args:
      source: headlines, text:PATH or tfds:NAME.
      out: directory to write to.
      kind: bpe, wordpiece or chars.
      vocab_size: tokens of bpe and wordpiece.
      split: which texts to train on.
    """
    texts = load_source(source, split)
    size = vocab_size if kind in ("bpe", "wordpiece") else None
    tokenizer = make_tokenizer(kind, texts, size)  # pyright: ignore
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    assert load_tokenizer(out).vocab_size == tokenizer.vocab_size
    print(f"{tokenizer.vocab_size:,} tokens, written to {out}/tokenizer.json", file=sys.stderr)
