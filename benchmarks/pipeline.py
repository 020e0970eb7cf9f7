"""The parts of the data pipeline as contestants, on text that is made up."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import SHAPES
from benchmarks.worker import Work
from lm.core.runtime import prepare

prepare()

from lm.data.corpus import TextData
from lm.data.example import tokenize as tokenize_source
from lm.data.pipeline import Order, Packed, make_loader

BATCHES = 20  # Of a unit of work, so that one takes milliseconds at least.
WORDS, DOCUMENTS, DOCUMENT_WORDS = 20_000, 4_000, 60


def write_text(path: Path) -> None:
    """Writes documents of made-up words, some frequent and most rare, as in a language."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    lengths = draw.integers(2, 11, WORDS)
    words = ["".join(draw.choice(letters, length)) for length in lengths]
    chance = 1 / np.arange(1, WORDS + 1)
    chosen = draw.choice(WORDS, (DOCUMENTS, DOCUMENT_WORDS), p=chance / chance.sum())
    path.write_text("".join(" ".join(words[i] for i in row) + ".\n" for row in chosen.tolist()))


def make_data(shape: str, inputs: str) -> TextData:
    """Returns the data of a shape: characters for the small vocabularies, otherwise byte pairs."""
    path = Path(inputs) / "text.txt"
    if not path.exists():
        write_text(path)
    kind = "chars" if SHAPES[shape].vocab_size < 256 else "bpe:8192"
    return TextData(f"text:{path}", kind, length=SHAPES[shape].length, layout="pack")


def tokenize(shape: str, inputs: str, dtype: str = "") -> Work:
    """Tokenizes the training split into the cache, as a run does once; a unit is all of it."""
    data = make_data(shape, inputs)
    tokenizer, source = data.make_tokenizer(), data.load("train")
    cache = Path(tempfile.mkdtemp(dir=inputs))

    def run(count: int) -> list[int]:
        sizes = []
        before = os.environ.get("LM_CACHE")
        os.environ["LM_CACHE"] = str(cache)
        for _ in range(count):
            sizes.append(len(tokenize_source(source, tokenizer).tokens.flat))
            shutil.rmtree(cache)
        os.environ.pop("LM_CACHE")
        if before is not None:
            os.environ["LM_CACHE"] = before
        return sizes

    return Work(run, {"tokens": run(1)[0], "settings": f"{data.tokenizer}, {len(source)} texts"})


def pack(shape: str, inputs: str, dtype: str = "") -> Work:
    """Lays documents out in rows, without Grain; a unit is `BATCHES` batches."""
    data, sizes = make_data(shape, inputs), SHAPES[shape]
    examples = data.make().examples("train")
    rows = Packed(examples, Order(len(examples), 0, True), sizes.length)
    numbers = itertools.count()

    def run(count: int) -> list[int]:
        for _ in range(count * BATCHES * sizes.batch_size):
            epoch, index = divmod(next(numbers), rows.num_rows)
            rows.row(epoch, index)
        return [0] * count

    return Work(run, {"tokens": tokens_of(shape), "settings": "rows of documents end to end"})


def loader(shape: str, inputs: str, dtype: str = "", prefetch: int = 2) -> Work:
    """Makes whole batches by the pipeline of a run; a unit is `BATCHES` of them.

    Args:
      shape, inputs, dtype: as of `benchmarks.ours.train`; the last plays no part.
      prefetch: batches made ahead, by as many threads but at most two.
    """
    data = make_data(shape, inputs)
    options: dict[str, Any] = dict(prefetch=prefetch, layout="pack", length=data.length)
    examples = data.make().examples("train")
    batches = make_loader(examples, batch_size=SHAPES[shape].batch_size, **options)

    def run(count: int) -> list[int]:
        for _ in range(count * BATCHES):
            next(batches)
        return [0] * count

    facts = {"settings": f"Grain, {min(prefetch, 2)} threads; {data.layout}"}
    return Work(run, {"tokens": tokens_of(shape), **facts})


def tokens_of(shape: str) -> int:
    return BATCHES * SHAPES[shape].batch_size * SHAPES[shape].length
