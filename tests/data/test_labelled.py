"""Labelled sets: what they hold, no text in two splits, and batches with labels."""

import numpy as np
import pytest

from lm.core.batch import Batch
from lm.data.example import Example
from lm.data.labelled import SETS, LabelledData, labelled_texts
from lm.data.pipeline import make_loader
from lm.data.text import key, split_of


@pytest.mark.parametrize(
    "name, labels, least",
    [
        ("bbc_topics", {"business", "entertainment", "politics", "sports", "tech"}, 2100),
        ("film_reviews", {"negative", "positive"}, 10_500),
    ],
)
def test_sets(name, labels, least):
    splits = labelled_texts(name)
    keys = [key(text) for pairs in splits.values() for text, _ in pairs]
    assert len(keys) == len(set(keys)) >= least
    for split, pairs in splits.items():
        assert all(split_of(text) == split for text, _ in pairs)
        assert {label for _, label in pairs} == labels
    assert 0.88 < len(splits["train"]) / len(keys) < 0.92
    assert not any("\ufffd" in text for pairs in splits.values() for text, _ in pairs)
    assert "from " in SETS[name].about


def test_unknown_set_says_what_there_is():
    with pytest.raises(ValueError, match="bbc_topics, film_reviews"):
        labelled_texts("reviews")


def test_batches_carry_labels():
    """A labelled text is [start] text [end], its text cut to the row; its label comes along.

    The end is read too, and no token is predicted from it, nor the end where the text was cut.
    """
    data = LabelledData("film_reviews", "wordpiece:300", length=16).make()
    texts, labels = data.texts_and_labels("validation")
    batches = list(data.validation(64))
    rows = np.concatenate([batch.segments for batch in batches]).any(axis=1)
    found = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(found[rows], labels)
    assert rows.sum() == len(texts) and not rows[len(texts) :].any()
    first: Batch = batches[0]
    for number, text in enumerate(texts[:64]):
        ids = data.tokenizer.encode(text)
        row = [data.tokenizer.bos_id, *ids[:14], data.tokenizer.eos_id]
        np.testing.assert_array_equal(first.tokens[number, : len(row)], row)
        np.testing.assert_array_equal(first.segments[number], np.arange(16) < len(row))
        predicted = np.arange(16) < len(row) - (1 if len(ids) < 14 else 2)
        np.testing.assert_array_equal(first.weights[number], predicted)
    assert {len(data.tokenizer.encode(text)) < 14 for text in texts[:64]} == {True, False}
    again = LabelledData("film_reviews", "wordpiece:300", length=16).make(data.tokenizer)
    assert again.fingerprint == data.fingerprint
    assert sorted(set(labels.tolist())) == [0, 1] and data.labels == ["negative", "positive"]


def test_labels_need_a_row_each():
    with pytest.raises(ValueError, match="rows"):
        make_loader([Example(np.arange(4), label=1)], batch_size=1, length=4, layout="pack")


def test_other_tokenizers_are_named():
    with pytest.raises(ValueError, match="wordpiece:SIZE"):
        LabelledData("film_reviews", "chars").make()


def test_the_tokenizer_of_a_run_is_taken_by_its_path(tmp_path):
    tokenizer = LabelledData("film_reviews", "wordpiece:300").make_tokenizer()
    tokenizer.save(tmp_path)
    again = LabelledData("film_reviews", str(tmp_path / "tokenizer.json")).make_tokenizer()
    assert again.encode("a good film") == tokenizer.encode("a good film")
