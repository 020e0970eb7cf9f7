"""How well labels are predicted: accuracy and macro-F1, beside baselines that need no network."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lm.core.batch import Batch
from lm.core.context import Context
from lm.data.labelled import Labelled

Array = np.ndarray


def accuracy(labels_N: Array, predictions_N: Array) -> float:
    """Returns the fraction of predictions that are right."""
    return float(np.mean(np.asarray(labels_N) == np.asarray(predictions_N)))


def macro_f1(labels_N: Array, predictions_N: Array) -> float:
    """Returns the mean over the classes of F1 = 2 TP / (2 TP + FP + FN).

    The classes are those that occur among labels or predictions, as in scikit-learn.
    """
    labels_N, predictions_N = np.asarray(labels_N), np.asarray(predictions_N)
    scores = []
    for label in np.union1d(labels_N, predictions_N):
        right = np.sum((labels_N == label) & (predictions_N == label))
        there, said = np.sum(labels_N == label), np.sum(predictions_N == label)
        scores.append(2 * right / (there + said))
    return float(np.mean(scores))


def scores(labels_N: Array, predictions_N: Array) -> dict[str, float]:
    """Returns both measures by name."""
    return {
        "accuracy": accuracy(labels_N, predictions_N),
        "macro_f1": macro_f1(labels_N, predictions_N),
    }


def predict_labels(model: Any, params: Any, batches: Iterable[Batch]) -> Array:
    """Returns the (N,) likeliest labels of the rows that are not padding, in order."""
    found = []
    for batch in batches:
        ctx = Context(segments_BT=batch.segments, token_types_BT=batch.token_types)
        best_B = np.asarray(_best(params, batch.tokens, ctx, model=model))
        found.append(best_B[(batch.segments != 0).any(axis=1)])
    return np.concatenate(found)


@partial(jax.jit, static_argnames="model")
def _best(params, tokens_BT, ctx: Context, *, model):
    return model.apply({"params": params}, tokens_BT, ctx, method="classify").argmax(axis=-1)


def majority(train_labels_N: Array, num_texts: int) -> Array:
    """Returns the commonest training label, (num_texts,) times."""
    return np.full(num_texts, np.bincount(train_labels_N).argmax())


def tfidf_logistic_regression(
    train_texts: Sequence[str], train_labels_N: Array, texts: Sequence[str]
) -> Array:
    """Returns the labels that logistic regression on tf-idf of words and word pairs predicts.

    Raises:
      ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ValueError(
            "the tf-idf baseline needs scikit-learn, which is not installed: pip install 'lm[eval]'"
        ) from error
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    pipeline = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    return pipeline.fit(train_texts, train_labels_N).predict(texts)


def classification_report(
    model: Any, params: Any, data: Labelled, batch_size: int, split: str = "test"
) -> dict[str, dict[str, float]]:
    """Returns the scores of a model, of the majority, and of tf-idf with logistic regression."""
    train_texts, train_labels = data.texts_and_labels("train")
    texts, labels = data.texts_and_labels(split)
    batches = data.evaluation(split, batch_size)
    return {
        "this model": scores(labels, predict_labels(model, params, batches)),
        "tf-idf + logistic": scores(
            labels, tfidf_logistic_regression(train_texts, train_labels, texts)
        ),
        "majority": scores(labels, majority(train_labels, len(texts))),
    }
