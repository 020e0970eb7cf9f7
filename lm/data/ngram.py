"""n-gram baselines: what held-out bits per character a model has to beat."""

from collections.abc import Sequence

import numpy as np

from lm.data.example import Corpus, Example


class NGram:
    """An n-gram model with interpolated Witten-Bell smoothing.

    p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)), where c counts in training, t(h) is the
    number of different tokens seen after h, and h' is h without its oldest token; below the unigram
    stands 1/V. A history never seen leaves p(w | h') as it is. The p(. | h) sum to 1.

    Counts are sorted arrays: a history is numbered by its place in the array of histories one token
    shorter, so codes stay below num_histories * V whatever the order.

    Witten and Bell, The zero-frequency problem (1991); Chen and Goodman (1998), section 2.5.

    Args:
      examples: documents with a start and an end token; the start token is never predicted.
      order: n; a history has n - 1 tokens, fewer after a document's start.
      vocab_size: V.
    """

    def __init__(self, examples: Sequence[Example], order: int, vocab_size: int):
        self.order, self.vocab_size = order, vocab_size
        histories, tokens = windows(examples, order, vocab_size)
        node = np.zeros(len(tokens), np.int64)
        self._levels = []
        for k in range(order):
            if k:
                codes = node * (vocab_size + 1) + histories[:, -k]
                known, node = np.unique(codes, return_inverse=True)
            else:
                known = np.zeros(1, np.int64)
            grams, counts = np.unique(node * vocab_size + tokens, return_counts=True)
            owners = grams // vocab_size
            totals = np.bincount(owners, counts, minlength=len(known))
            types = np.bincount(owners, minlength=len(known))
            self._levels.append((known, grams, counts, totals, types))

    def probabilities(self, histories: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Returns p(token | history).

        Args:
          histories: (N, order - 1) int64, the oldest token first; V where a document had not begun.
          tokens: (N,) int64.

        Returns:
          (N,) float64.
        """
        p = np.full(len(tokens), 1 / self.vocab_size)
        node, seen = np.zeros(len(tokens), np.int64), np.ones(len(tokens), bool)
        for k, (known, grams, counts, totals, types) in enumerate(self._levels):
            if k:
                codes = node * (self.vocab_size + 1) + histories[:, -k]
                node, found = _find(known, codes)
                seen &= found
            place, found = _find(grams, node * self.vocab_size + tokens)
            count = np.where(found, counts[place], 0)
            mixed = (count + types[node] * p) / (totals[node] + types[node])
            p = np.where(seen, mixed, p)
        return p

    def bits_per_char(self, examples: Sequence[Example], num_chars: int) -> float:
        """Returns the bits of all tokens, end-of-text included, over the number of characters."""
        histories, tokens = windows(examples, self.order, self.vocab_size)
        return float(-np.log2(self.probabilities(histories, tokens)).sum() / num_chars)


def windows(
    examples: Sequence[Example], order: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns every predicted token of the documents and the order - 1 tokens before it.

    Returns:
      histories (N, order - 1) and tokens (N,), int64. Before a document's start stands V.
    """
    if isinstance(examples, Corpus):
        flat, lengths = np.asarray(examples.tokens.flat, np.int64), np.diff(examples.tokens.offsets)
    else:
        flat = np.concatenate([np.asarray(example.tokens, np.int64) for example in examples])
        lengths = np.array([len(example.tokens) for example in examples])
    places = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    predicted = np.flatnonzero(places > 0)
    back = np.arange(order - 1, 0, -1)
    inside = places[predicted][:, None] >= back
    histories = np.where(inside, flat[predicted[:, None] - back], vocab_size)
    return histories, flat[predicted]


def _find(table: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where codes stand in a sorted table (0 if they do not), and whether they do."""
    place = np.minimum(np.searchsorted(table, codes), len(table) - 1)
    found = table[place] == codes
    return np.where(found, place, 0), found


def baselines(
    train: Sequence[Example], held_out: Sequence[Example], num_chars: int, vocab_size: int
) -> dict[str, float]:
    """Returns the held-out bits per character of a bigram and of a 5-gram.

    Args:
      train: the training split.
      held_out: the split to be predicted, its end-of-text tokens included.
      num_chars: characters in it, `Corpus.num_chars`; end-of-text does not count.
      vocab_size: V.
    """
    models = {"bigram": 2, "5-gram": 5}
    return {
        name: NGram(train, order, vocab_size).bits_per_char(held_out, num_chars)
        for name, order in models.items()
    }
