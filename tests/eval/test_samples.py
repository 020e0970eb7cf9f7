"""Samples of a run, and the two rates of Figure 2 by hand and on a model that was made to copy."""

from types import SimpleNamespace

import pytest

from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.eval.samples import (
    draw_samples,
    out_of_lexicon_rate,
    repeated_bigram_rate,
    temperature_sweep,
    write_samples,
)
from tests.conformance.harness import tiny


@pytest.fixture(scope="module")
def loaded():
    model, params = tiny("teeny_gpt")
    return SimpleNamespace(model=model, params=params, tokenizer=teeny_gpt_tokenizer())


@pytest.mark.slow
def test_samples_differ_and_are_reproducible(loaded, tmp_path):
    samples = draw_samples(loaded, max_new_tokens=20, prompt="the ")
    assert list(samples) == [0.5, 1.0] and all(len(texts) == 10 for texts in samples.values())
    assert all(text.startswith("the ") for text in samples[0.5])
    assert len({*samples[0.5], *samples[1.0]}) == 20
    assert draw_samples(loaded, max_new_tokens=20, prompt="the ") == samples
    write_samples(tmp_path / "samples.txt", samples)
    lines = (tmp_path / "samples.txt").read_text().split("\n")
    assert lines[0] == "temperature 0.5" and lines[1:11] == samples[0.5]
    assert lines[12] == "temperature 1" and lines[13:23] == samples[1.0]


def test_rates_by_hand():
    texts = ["the cat sat", "the cat ran off", "zq"]
    assert out_of_lexicon_rate(texts, {"the", "cat", "sat", "ran"}) == pytest.approx(2 / 8)
    # the-cat, cat-sat | the-cat, cat-ran, ran-off: four distinct of five.
    assert repeated_bigram_rate(texts) == pytest.approx(1 / 5)
    assert repeated_bigram_rate(["a a a a"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no words"):
        out_of_lexicon_rate(["", " "], {"a"})
    with pytest.raises(ValueError, match="no two words"):
        repeated_bigram_rate(["one", "two"])


@pytest.mark.slow
def test_cold_repeats_and_hot_is_nonsense(loaded):
    """Greedy samples are one text again and again, all of it in a lexicon made of that text."""
    cold = draw_samples(loaded, max_new_tokens=50, temperatures=(0.0,), count=1)[0.0][0]
    sweep = temperature_sweep(
        loaded, set(cold.split()), max_new_tokens=50, temperatures=(0.0, 1.0), count=20
    )
    assert sweep[0.0]["out_of_lexicon"] == 0.0
    assert sweep[0.0]["repeated_bigrams"] >= 0.95 > sweep[1.0]["repeated_bigrams"]
    assert sweep[1.0]["out_of_lexicon"] > 0.5
