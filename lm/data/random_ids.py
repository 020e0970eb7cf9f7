"""Batches of random tokens: the shape of a run's data, where the data themselves do not matter."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from lm.core.batch import Batch


@dataclass(frozen=True)
class RandomIds:
    """Rows of one document of random ids each, without a tokenizer: for plans and measurements.

    Attributes:
      vocab_size: ids are drawn evenly from 0 to this.
      length: T, places of a row.
    """

    vocab_size: int
    length: int

    tokenizer = None

    def make(self) -> "RandomIds":
        return self

    @property
    def fingerprint(self) -> str:
        return f"random ids below {self.vocab_size} in rows of {self.length}"

    @property
    def about(self) -> str:
        return self.fingerprint

    def train(self, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
        """Yields this process's rows of batches `start`, ...; batch k is drawn from (seed, k)."""
        step = start
        while True:
            yield self.batch(batch_size, (seed, step))
            step += 1

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Yields one batch, the same each time."""
        yield self.batch(batch_size, (0, 0, 1))

    def batch(self, batch_size: int, numbers: tuple[int, ...]) -> Batch:
        shape = (batch_size, self.length + 1)
        ids = np.random.default_rng(numbers).integers(self.vocab_size, size=shape, dtype=np.int32)
        ids = np.split(ids, jax.process_count())[jax.process_index()]
        places = (len(ids), self.length)
        weights, segments = np.ones(places, np.float32), np.ones(places, np.int32)
        return Batch(ids[:, :-1], ids[:, 1:], weights, segments)
