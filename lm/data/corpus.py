"""What a run reads, as one value: a source, a tokenizer, a layout."""

import math
from dataclasses import dataclass
from pathlib import Path

from lm.data.example import tokenize
from lm.data.files import Unit
from lm.data.inspect import train_tokenizer
from lm.data.ngram import baselines
from lm.data.pipeline import Layout
from lm.data.source import Source, load_source
from lm.data.splits import NO_START, Splits
from lm.data.tokenizer import CharTokenizer, SubwordTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TextData:
    """Text by name, tokenized and laid out in rows.

    Attributes:
      source: 'headlines', 'headlines/original', 'text:PATH' or 'tfds:NAME'.
      tokenizer: 'teeny_gpt', 'chars', 'bpe:8192' or 'wordpiece:8192', trained on the training
        split where there is something to train; or the path of a tokenizer.json or its directory;
        or '' for that of the model which a run starts from.
      length: T, places of a row.
      layout: 'rows' for one document a row; 'pack' for documents end to end, cut where a row ends;
        'fit' for whole documents, as many as fit a row. Each is a segment of its own.
      unit: whether a document is a 'line' of a .txt file or a whole 'file'.
      field: JSON field or feature that is the text; '' for 'text' or the only one.
      source_field: the one that an encoder reads; '' for none.
      source_length: places of an encoder's row; None is `length` where there is a source.
    """

    source: str = "headlines"
    tokenizer: str = "chars"
    length: int = 256
    layout: Layout = "pack"
    unit: Unit = "line"
    field: str = ""
    source_field: str = ""
    source_length: int | None = None

    def make(self, tokenizer: Tokenizer | None = None) -> "Corpora":
        """Prepares the data, with the tokenizer of a run where one is given.

        Raises:
          ValueError: as `load_source`, `train_tokenizer` and `tokenize`.
        """
        return Corpora(self, tokenizer or self.make_tokenizer())

    def load(self, split: str) -> Source:
        """Returns the raw texts of a split."""
        options = dict(unit=self.unit, field=self.field, source_field=self.source_field)
        return load_source(self.source, split, **options)

    def make_tokenizer(self) -> CharTokenizer | SubwordTokenizer:
        """Returns the tokenizer that the config names, trained if need be."""
        kind, _, size = self.tokenizer.partition(":")
        if kind in ("teeny_gpt", "chars") and not size:
            # Held-out text has characters that the training split lacks.
            return train_tokenizer(kind, self.load("train"), unknown="unk")
        if kind in ("bpe", "wordpiece") and size.isdigit():
            return train_tokenizer(kind, self.load("train"), int(size))
        if not self.tokenizer:
            raise ValueError(NO_START)
        if Path(self.tokenizer).exists():
            return load_tokenizer(self.tokenizer)
        raise ValueError(
            f"tokenizer {self.tokenizer!r} is none of teeny_gpt, chars, bpe:SIZE, wordpiece:SIZE, "
            "or the path of a tokenizer.json"
        )


class Corpora(Splits):
    """The tokenized splits of a `TextData`, each made when it is first asked for."""

    def __init__(self, config: TextData, tokenizer: Tokenizer):
        self.config = config
        source_length = config.source_length or config.length
        super().__init__(
            lambda split: tokenize(config.load(split), tokenizer),
            tokenizer,
            config.length,
            config.layout,
            source_length if config.source_field else None,
        )

    @property
    def fingerprint(self) -> str:
        """Changes whenever the training text or its tokens do."""
        return self.examples("train").fingerprint

    def bits_per_character(self, nats_per_token: float, split: str = "validation") -> float:
        """Returns the loss of a whole split in bits per character, end-of-text symbols included."""
        corpus = self.examples(split)
        predictions = len(corpus.tokens.flat) - len(corpus)
        return nats_per_token * predictions / corpus.num_chars / math.log(2)

    def baselines(self, split: str = "validation") -> dict[str, float]:
        """Returns the bits per character of n-gram models trained on the training split."""
        held_out = self.examples(split)
        return baselines(
            self.examples("train"), held_out, held_out.num_chars, self.tokenizer.vocab_size
        )
