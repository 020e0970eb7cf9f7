"""ln p of continuations, as benchmarks ask for it, against one forward pass for each."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest

from lm.core.context import Context
from lm.data.tokenizer import teeny_gpt_tokenizer, train_bpe
from lm.infer.score import (
    encode_pair,
    loglikelihood,
    loglikelihood_tokens,
    num_too_long,
    score,
)
from lm.models.encdec import EncoderDecoder
from tests.conformance.harness import FAMILIES, forward, random_params

WIDTH = 24


@functools.cache
def one_layer(name):
    """The tiny model of a family with a single layer, which compiles sooner, and its parameters."""
    model = FAMILIES[name].build(**{**FAMILIES[name].tiny, "num_layers": 1})
    return model, random_params(model)


@pytest.fixture(scope="module")
def teeny_text():
    model, params = one_layer("teeny_gpt")
    return SimpleNamespace(model=model, params=params, tokenizer=teeny_gpt_tokenizer())


def random_pairs(model, count, longest, seed=0):
    """(context, continuation) of random ids and lengths, together at most `longest`."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        total = rng.integers(2, longest + 1)
        ids = rng.integers(1, model.vocab_size, total).tolist()
        cut = rng.integers(1, total)
        found.append((ids[:cut], ids[cut:]))
    return found


def brute_force(model, params, context, continuation):
    """Sum of ln p in float64 and whether all are the likeliest, from one padded row."""
    ctx, before = Context(), context
    if isinstance(model, EncoderDecoder):
        source, segments = (np.zeros((1, WIDTH), np.int32) for _ in range(2))
        source[0, : len(context)], segments[0, : len(context)] = context, 1
        ctx, before = Context(source_BS=source, source_segments_BS=segments), [model.start_id]
    tokens = np.zeros((1, WIDTH), np.int32)
    row = [*before, *continuation]
    tokens[0, : len(row)] = row
    logits = np.asarray(forward(model, params, tokens, ctx)[0][0], np.float64)
    places = range(len(before) - 1, len(row) - 1)
    sums = [logits[t, row[t + 1]] - np.log(np.exp(logits[t]).sum()) for t in places]
    return sum(sums), all(logits[t].argmax() == row[t + 1] for t in places)


@pytest.mark.parametrize("name", ["llama", pytest.param("mamba", marks=pytest.mark.slow), "t5"])
@pytest.mark.slow
def test_equals_brute_force(name):
    model, params = one_layer(name)
    loaded = SimpleNamespace(model=model, params=params)
    pairs = random_pairs(model, 12, WIDTH - 1)
    # One that is greedy: the likeliest token after a context.
    context = pairs[0][0]
    best = max(range(model.vocab_size), key=lambda i: brute_force(model, params, context, [i])[0])
    pairs.append((context, [best]))
    found = loglikelihood_tokens(loaded, pairs, batch_size=7)
    for pair, ours in zip(pairs, found):
        expected, greedy = brute_force(model, params, *pair)
        assert ours.sum == pytest.approx(expected, abs=1e-4) and ours.is_greedy == greedy
    assert found[-1].is_greedy and not all(ours.is_greedy for ours in found)


def test_what_is_too_long_is_cut_on_the_left():
    model, params = one_layer("llama")
    loaded, limit = SimpleNamespace(model=model, params=params), model.max_length
    ids = np.random.default_rng(0).integers(1, model.vocab_size, 3 * limit).tolist()
    fits = (ids[-limit - 1 : -5], ids[-5:])  # The last token is predicted and not read.
    too_long = (ids[:-5], ids[-5:])
    endless = (ids[:5], ids[5:])
    all_that_can_be = (ids[-limit - 1 : -limit], ids[-limit:])
    pairs = [fits, too_long, endless, all_that_can_be]
    found = loglikelihood_tokens(loaded, pairs)
    assert found[0].sum == pytest.approx(found[1].sum, abs=1e-4)
    assert found[2].sum == pytest.approx(found[3].sum, abs=1e-4)
    assert num_too_long(model, pairs) == 2
    assert num_too_long(SimpleNamespace(max_length=None), [endless]) == 0


def test_compilations_are_bounded_by_the_buckets_of_lengths(compilations):
    model, params = one_layer("teeny_gpt")
    loaded, sizes = SimpleNamespace(model=model, params=params), []
    with compilations() as compiled:
        pairs = random_pairs(model, 90, 33, seed=1)
        loglikelihood_tokens(loaded, pairs, batch_size=6, on_batch=sizes.append)
    assert sum(sizes) == 90 and len(sizes) == 15
    assert 1 <= len(compiled) <= 3  # Widths of 16, 24 and 32.
    with compilations() as compiled:
        loglikelihood_tokens(loaded, pairs[::-1] + pairs[:31], batch_size=6)
    assert not compiled


def test_pairs_of_texts_are_one_text(teeny_text):
    model, params = teeny_text.model, teeny_text.params
    bos = teeny_text.tokenizer.bos_id
    pairs = [("the cat", " sat"), ("the cat ", "sat"), ("", "mat"), (" ", "mat")]
    found = loglikelihood(teeny_text, pairs)
    assert found[0] == found[1]
    (whole,) = score(teeny_text, [("the cat", " sat")])
    assert found[0].sum == pytest.approx(whole.sum, abs=1e-4)
    expected, _ = brute_force(model, params, [bos], teeny_text.tokenizer.encode("mat"))
    assert found[2].sum == pytest.approx(expected, abs=1e-4)
    expected, _ = brute_force(model, params, [bos], teeny_text.tokenizer.encode(" mat"))
    assert found[3].sum == pytest.approx(expected, abs=1e-4)


def test_a_pair_is_cut_where_the_context_alone_ends():
    tokenizer = train_bpe(["the cat sat on the mat " * 20], 270)
    it = SimpleNamespace(model=one_layer("llama")[0], tokenizer=tokenizer)
    whole = tokenizer.encode("the cat sat")
    before, after = encode_pair(it, "the ca", "t sat")  # A token spans the cut.
    assert before == [tokenizer.bos_id, *tokenizer.encode("the ca")]
    assert after == [tokenizer.bos_id, *whole][len(before) :]
    it.tokenizer = SimpleNamespace(encode=tokenizer.encode, bos_id=None, eos_id=None)
    assert encode_pair(it, "", "the cat") == (whole[:1], tokenizer.encode("the cat")[1:])
    assert encode_pair(it, "the", " cat") == (tokenizer.encode("the"), tokenizer.encode(" cat"))


def test_bad_input_is_named(teeny_text):
    with pytest.raises(ValueError, match="continuation 1 is empty"):
        loglikelihood(teeny_text, [("the", " cat"), ("the", "")])
    with pytest.raises(ValueError, match="context 0 is empty"):
        loglikelihood_tokens(teeny_text, [([], [1, 2])])
    with pytest.raises(ValueError, match="token id 99"):
        loglikelihood_tokens(teeny_text, [([1], [99])])
    with pytest.raises(ValueError, match="there is no context"):
        loglikelihood(teeny_text, [])
    both_ways = SimpleNamespace(model=FAMILIES["bert"].build(**FAMILIES["bert"].tiny))
    with pytest.raises(ValueError, match="bidirectional"):
        loglikelihood_tokens(both_ways, [([1], [2])])
