"""Poolers against loops over the places that are not padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.layers.pool import Concat, Dense, FirstToken, LastToken, MaxPool, MeanPool

# Padding on the right, on the left, in the middle of two documents, nowhere, and everywhere.
SEGMENTS = np.array(
    [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 2, 2, 0], [1] * 6, [0] * 6], np.int32
)
X = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float32) - 2.0


def pool(pooler, x=X, segments=SEGMENTS):
    ctx = Context(segments_BT=None if segments is None else jnp.asarray(segments))
    return np.asarray(jax.jit(lambda x: pooler.apply({}, x, ctx))(jnp.asarray(x)))


POOLERS = [
    (FirstToken(), lambda rows: rows[0]),
    (LastToken(), lambda rows: rows[-1]),
    (MeanPool(), lambda rows: rows.mean(0)),
    (MaxPool(), lambda rows: rows.max(0)),
]


@pytest.mark.parametrize("pooler, oracle", POOLERS)
def test_equals_a_loop(pooler, oracle):
    pooled = pool(pooler)
    for x, segments, vector in list(zip(X, SEGMENTS, pooled))[:4]:
        np.testing.assert_allclose(vector, oracle(x[segments != 0]), atol=1e-6)
    assert np.abs(pooled[4]).max() < 10
    for x, vector in zip(X, pool(pooler, segments=None)):
        np.testing.assert_allclose(vector, oracle(x), atol=1e-6)


@pytest.mark.ledger("L12")
def test_concat_is_last_max_mean():
    """[h_T; max; mean] of ULMFiT over the places that are not padding, whatever the others hold."""
    pooled = pool(Concat())
    assert pooled.shape == (5, 3 * X.shape[-1])
    for x, segments, vector in list(zip(X, SEGMENTS, pooled))[:4]:
        rows = [x[t] for t in range(len(x)) if segments[t]]
        best, total = rows[0], np.zeros_like(rows[0])
        for row in rows:
            best, total = np.maximum(best, row), total + row
        expected = np.concatenate([rows[-1], best, total / len(rows)])
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    elsewhere = pool(Concat(), np.where(SEGMENTS[..., None], X, 9e9))
    np.testing.assert_array_equal(elsewhere[:4], pooled[:4])


def test_gradient_reaches_no_padding():
    ctx = Context(segments_BT=jnp.asarray(SEGMENTS))
    grad = jax.jit(jax.grad(lambda x: jnp.square(Concat().apply({}, x, ctx)).sum()))(jnp.asarray(X))
    assert (np.asarray(grad)[:4][SEGMENTS[:4] == 0] == 0).all()
    assert np.isfinite(grad).all()


def test_dense_over_a_pooler():
    part = Dense(MeanPool(), 3, "relu")
    ctx = Context(segments_BT=jnp.asarray(SEGMENTS))
    variables = part.init(jax.random.key(0), jnp.asarray(X), ctx)
    kernel = np.asarray(variables["params"]["dense"]["kernel"].unbox())
    expected = np.maximum(pool(MeanPool()) @ kernel, 0)
    np.testing.assert_allclose(part.apply(variables, jnp.asarray(X), ctx), expected, atol=1e-5)
