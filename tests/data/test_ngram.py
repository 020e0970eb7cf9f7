import collections
import math

import numpy as np
import pytest

from lm.data.example import Example, tokenize
from lm.data.ngram import NGram, baselines, windows
from lm.data.tokenizer import teeny_gpt_tokenizer


def toy(num, seed, vocab_size=7):
    rng = np.random.default_rng(seed)
    return [
        Example(np.array([1, *rng.integers(2, vocab_size, rng.integers(0, 9)), 0]))
        for _ in range(num)
    ]


def witten_bell(examples, order, vocab_size):
    """p(token | history) by the recursion as it is written, over dictionaries."""
    after = collections.defaultdict(collections.Counter)
    for example in examples:
        tokens = [vocab_size] * (order - 1) + example.tokens.tolist()
        for n in range(order, len(tokens)):
            for k in range(order):
                after[tuple(tokens[n - k : n])][tokens[n]] += 1

    def p(token, history):
        lower = p(token, history[1:]) if history else 1 / vocab_size
        counts = after[history]
        if not counts:
            return lower
        return (counts[token] + len(counts) * lower) / (counts.total() + len(counts))

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_recursion(order):
    train, held_out = toy(60, 0), toy(40, 1)
    model, oracle = NGram(train, order, 7), witten_bell(train, order, 7)
    histories, tokens = windows(held_out, order, 7)
    want = [oracle(int(w), tuple(h)) for h, w in zip(histories.tolist(), tokens)]
    np.testing.assert_allclose(model.probabilities(histories, tokens), want, rtol=1e-12)
    bits = -sum(math.log2(p) for p in want) / 100
    assert model.bits_per_char(held_out, 100) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_is_a_distribution(order):
    model = NGram(toy(60, 2), order, 7)
    rng = np.random.default_rng(3)
    for history in rng.integers(0, 8, (200, order - 1)):  # 7 stands before the start.
        p = model.probabilities(np.tile(history, (7, 1)), np.arange(7))
        assert (p > 0).all() and p.sum() == pytest.approx(1, abs=1e-12)


def test_counts_every_token_after_the_start():
    examples = [Example(np.array([5, 3, 4, 0])), Example(np.array([5, 0]))]
    histories, tokens = windows(examples, 3, 9)
    assert tokens.tolist() == [3, 4, 0, 0]
    assert histories.tolist() == [[9, 5], [5, 3], [3, 4], [9, 5]]


@pytest.mark.slow
def test_baselines_of_the_headlines(original, validation):
    train = tokenize(original["train"], teeny_gpt_tokenizer())
    bits = baselines(train, validation, validation.num_chars, 29)
    assert 2.0 < bits["5-gram"] < 2.1 and 3.7 < bits["bigram"] < 3.8
    # The bigram with add-one smoothing, by its definition, is no better.
    counts, (before, after) = np.ones((29, 29)), bigrams(train)
    np.add.at(counts, (before, after), 1)
    before, after = bigrams(validation)
    p = counts[before, after] / counts.sum(1)[before]
    add_one = -np.log2(p).sum() / validation.num_chars
    assert bits["bigram"] <= add_one and bits["bigram"] == pytest.approx(add_one, abs=0.01)


def bigrams(corpus):
    flat = corpus.tokens.flat
    inside = flat[1:] != 28  # The start token is no character.
    return flat[:-1][inside], flat[1:][inside]
