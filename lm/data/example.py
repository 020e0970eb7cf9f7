"""What the pipeline reads: token ids with a weight each, by the document."""

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.cache import build_once, cache_dir
from lm.data.files import Text
from lm.data.source import Source
from lm.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """One document.

    Attributes:
      tokens: (T+1,) ids, a start token first and an end token last; T places predict the next one.
      weights: (T+1,) float32, how much predicting each token counts (the first one is never
        predicted), or None for 1 everywhere.
      source: (S,) ids that an encoder reads, or None.
      label: number of the class of the document, or None.
    """

    tokens: np.ndarray
    weights: np.ndarray | None = None
    source: np.ndarray | None = None
    label: int | None = None


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths, laid end to end.

    Attributes:
      flat: (N,) all ids.
      offsets: (num_sequences + 1,) int64, where each sequence begins, and N.
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Corpus(Sequence[Example]):
    """The examples of a tokenized text, read from disk as they are needed.

    Attributes:
      tokens: the documents, with their start and end tokens.
      sources: what an encoder reads for each, or None.
      num_chars: characters in what the documents' tokens decode to.
      num_bytes: UTF-8 bytes in that.
      fingerprint: a string that changes whenever the tokens do.
    """

    tokens: Ragged
    sources: Ragged | None
    num_chars: int
    num_bytes: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        return Example(self.tokens[index], None, self.sources[index] if self.sources else None)


def start_id(tokenizer: Tokenizer) -> int:
    """Returns what stands before a text: the tokenizer's bos, or its eos where it has none (GPT-2).

    Raises:
      ValueError: it has neither.
    """
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if start is None or tokenizer.eos_id is None:
        raise ValueError(
            "The tokenizer should name an end-of-text token, and has none: give it an eos_token in "
            "tokenizer_config.json."
        )
    return start


def fingerprint(content: str, tokenizer: Tokenizer) -> str:
    """Returns a string that changes whenever what is read, or the tokenizer's files, do."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        saved = [path.read_bytes() for path in sorted(Path(scratch).iterdir())]
    return hashlib.sha256(b"\0".join([content.encode(), *saved])).hexdigest()[:32]


def tokenize(source: Source, tokenizer: Tokenizer) -> Corpus:
    """Returns a source's documents as [start] text [end], tokenized once and kept in the cache.

    Args:
      source: the texts.
      tokenizer: what tokenizes them.

    Raises:
      ValueError: the tokenizer has no end-of-text token, or makes ids outside its vocabulary.
    """
    digest = fingerprint(source.fingerprint, tokenizer)
    folder = cache_dir() / "tokens" / digest
    build_once(folder, lambda: _write(source, tokenizer, folder))
    num_chars, num_bytes = np.load(folder / "sizes.npy").tolist()
    sources = _open(folder, "source") if source.source_field else None
    return Corpus(_open(folder, "text"), sources, num_chars, num_bytes, digest)


def _open(folder: Path, name: str) -> Ragged:
    # Slices of a plain view cost a third of a memmap's.
    flat = np.memmap(folder / f"{name}.bin", np.int32, mode="r").view(np.ndarray)
    return Ragged(flat, np.load(folder / f"{name}.npy"))


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        _write_files(source, tokenizer, new)
        os.replace(new, folder)


def _write_files(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    start, end = start_id(tokenizer), tokenizer.eos_id
    sizes = np.zeros(2, np.int64)
    before = {"text": [start], **({"source": []} if source.source_field else {})}
    lengths: dict[str, list[int]] = {name: [0] for name in before}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in before}
        for texts in _chunks(source):
            for name, file in files.items():
                ids = tokenizer.encode_batch([getattr(text, name) for text in texts])
                rows = [[*before[name], *row, end] for row in ids]
                lengths[name] += map(len, rows)
                flat = np.fromiter(itertools.chain(*rows), np.int32)
                check_ids(flat, tokenizer.vocab_size)
                flat.tofile(file)
                if name == "text":
                    # A tokenizer may drop characters; only those that it keeps are predicted.
                    kept = list(map(tokenizer.decode, ids))
                    sizes += sum(map(len, kept)), sum(len(text.encode()) for text in kept)
    for name in before:
        np.save(folder / f"{name}.npy", np.cumsum(lengths[name], dtype=np.int64))
    np.save(folder / "sizes.npy", sizes)


def _chunks(source: Source) -> Iterator[list[Text]]:
    texts = iter(source)
    while chunk := list(itertools.islice(texts, 1000)):
        yield chunk


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises a ValueError for an id outside 0..vocab_size-1; JAX would clamp it silently."""
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(
            f"Token ids should be in 0..{vocab_size - 1} and are in {ids.min()}..{ids.max()}: the "
            f"text was tokenized for another vocabulary."
        )
