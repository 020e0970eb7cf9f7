"""A run small enough to be trained hundreds of times in tests."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lm.core.batch import Batch
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine

VOCAB_SIZE, LENGTH = 11, 12


def make_batch(seed: int, batch_size: int, length: int = LENGTH, uneven: bool = True) -> Batch:
    """Counting sequences, each from its own start, padded to uneven lengths."""
    rng = np.random.default_rng(seed)
    text = (rng.integers(0, 10, (batch_size, 1)) + np.arange(length + 1)) % 10 + 1
    lengths = rng.integers(3, length + 1, (batch_size, 1)) if uneven else length
    segments = (np.arange(length) < lengths).astype(np.int32)
    return Batch(
        tokens=(text[:, :-1] * segments).astype(np.int32),
        targets=(text[:, 1:] * segments).astype(np.int32),
        weights=segments.astype(np.float32),
        segments=segments,
    )


@dataclasses.dataclass(frozen=True)
class ToyData:
    """Batch k is made from the numbers (seed, k), so it is a pure function of them."""

    length: int = LENGTH
    validation_batches: int = 2
    weight: float = 1.0

    tokenizer = None
    fingerprint = "toy"

    def make(self) -> "ToyData":
        return self

    def train(self, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
        step = start
        while True:
            batch = make_batch(1000 * seed + step, batch_size, self.length)
            yield batch.replace(weights=batch.weights * np.float32(self.weight))
            step += 1

    def validation(self, batch_size: int) -> Iterator[Batch]:
        for index in range(self.validation_batches):
            yield make_batch(10**6 + index, batch_size, self.length)


def tiny_model(**changes):
    sizes = dict(
        vocab_size=VOCAB_SIZE,
        max_length=16,
        num_features=16,
        num_heads=2,
        num_layers=2,
        mlp_multiplier=2,
    )
    return teeny_gpt(**sizes | changes)


def toy_experiment(**train) -> Experiment:
    settings = dict(steps=20, batch_size=8, eval_every=10, checkpoint_every=5, log_every=1)
    return Experiment(
        name="toy",
        model=tiny_model(dropout=0.1),
        data=ToyData(),
        optimizer=AdamW(Cosine(1e-2, warmup=5)),
        train=TrainConfig(**settings | train),
    )
