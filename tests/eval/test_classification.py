"""Measures against scikit-learn's; baselines; labels of a model."""

import sys

import jax
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.eval.classification import (
    accuracy,
    macro_f1,
    majority,
    predict_labels,
    tfidf_logistic_regression,
)
from lm.models import params as P
from lm.models.families.gpt2 import FAMILY
from lm.models.tasks import for_task


@pytest.mark.parametrize("classes, seed", [(2, 0), (5, 1), (9, 2)])
def test_measures_equal_scikit_learn(classes, seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 40)
    # One class is never there, another never said.
    predictions = np.where(rng.random(40) < 0.6, labels, rng.integers(0, classes + 1, 40))
    predictions[predictions == 1] = 0
    assert accuracy(labels, predictions) == pytest.approx(
        metrics.accuracy_score(labels, predictions), abs=1e-12
    )
    expected = metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert macro_f1(labels, predictions) == pytest.approx(expected, abs=1e-12)


def test_majority():
    np.testing.assert_array_equal(majority(np.array([2, 0, 2, 1]), 3), [2, 2, 2])


def test_tfidf_learns_words():
    pytest.importorskip("sklearn")
    texts = ["good film", "good play", "bad film", "bad play"] * 3
    labels = np.array([1, 1, 0, 0] * 3)
    found = tfidf_logistic_regression(texts, labels, ["a good one", "a bad one"])
    np.testing.assert_array_equal(found, [1, 0])


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ValueError, match=r"lm\[eval\]"):
        tfidf_logistic_regression(["a"], np.array([0]), ["a"])


def test_labels_of_a_model_leave_out_padding_rows():
    model = for_task(FAMILY.build(**FAMILY.tiny), "sequence", 4)
    params = P.init(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 61, (6, 8)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[4:] = 0
    batch = Batch(tokens, tokens, segments.astype(np.float32), segments)
    found = predict_labels(model, params, [batch, batch])
    expected = jax.jit(lambda p, t: model.apply({"params": p}, t, method="classify"))(
        params, tokens[:4]
    )
    np.testing.assert_array_equal(found, np.tile(np.argmax(expected, axis=-1), 2))
