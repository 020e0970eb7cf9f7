"""What data of every kind share: a tokenizer, and each split as batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lm.data.example import Example
from lm.data.pipeline import Layout, Loader, make_loader
from lm.data.tokenizer import Tokenizer

NO_START = (
    "tokenizer '' is that of the model which a run starts from, and this one starts from none: "
    "start from a model (--init-from MODEL), or name a tokenizer"
)


class Splits:
    """The tokenized splits of a data set, each made when it is first asked for.

    Attributes:
      tokenizer: what made the tokens.
      examples: split -> its examples.
    """

    def __init__(
        self,
        make_examples: Callable[[str], Sequence[Example]],
        tokenizer: Tokenizer,
        length: int,
        layout: Layout = "rows",
        source_length: int | None = None,
    ):
        """Prepares the splits.

        Args:
          make_examples: split -> its examples.
          tokenizer: what makes the tokens.
          length, layout, source_length: of a row, as of `make_loader`.
        """
        self.examples: Callable[[str], Any] = functools.cache(make_examples)
        self.tokenizer = tokenizer
        self._shape: dict[str, Any] = dict(
            length=length, layout=layout, source_length=source_length
        )

    def train(self, batch_size: int, seed: int, start: int = 0) -> Loader:
        """Returns this process's rows of the global training batches from `start` on."""
        return self._load("train", batch_size, seed=seed, start=start)

    def validation(self, batch_size: int) -> Loader:
        """Returns the validation split once, in order."""
        return self.evaluation("validation", batch_size)

    def evaluation(self, split: str, batch_size: int) -> Loader:
        """Returns a split once, in order, the last batch filled with rows of weight 0."""
        return self._load(split, batch_size, shuffle=False, epochs=1)

    def _load(self, split: str, batch_size: int, **options: Any) -> Loader:
        return make_loader(
            self.examples(split),
            batch_size=batch_size,
            vocab_size=self.tokenizer.vocab_size,
            pad_id=self.tokenizer.pad_id or 0,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **self._shape,
            **options,
        )
