"""Random ids: a function of seed and step, within the vocabulary, shifted by one."""

import numpy as np

from lm.data.random_ids import RandomIds


def test_batches_are_a_function_of_seed_and_step():
    data = RandomIds(vocab_size=50, length=200).make()
    batches = data.train(4, seed=1, start=3)
    fourth, fifth = next(batches), next(batches)
    again = next(data.train(4, seed=1, start=4))
    np.testing.assert_array_equal(fifth.tokens, again.tokens)
    assert (fourth.tokens != fifth.tokens).any()
    assert (next(data.train(4, seed=2, start=3)).tokens != fourth.tokens).any()
    np.testing.assert_array_equal(fourth.tokens[:, 1:], fourth.targets[:, :-1])
    assert set(np.unique(fourth.tokens)) == set(range(50))
    assert fourth.tokens.shape == fourth.weights.shape == fourth.segments.shape == (4, 200)
    assert fourth.weights.all() and (fourth.segments == 1).all()
    np.testing.assert_array_equal(next(data.validation(4)).tokens, next(data.validation(4)).tokens)
