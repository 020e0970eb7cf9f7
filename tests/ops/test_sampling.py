"""The samplers against transformers' logits processors, brute force, and the exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops import sampling as ops

B, V = 7, 41


def random_logits(seed=0, shape=(B, V), scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def processed(processor, logits_BV, tokens_BT=None):
    torch = pytest.importorskip("torch")
    tokens = torch.zeros((len(logits_BV), 1), dtype=torch.long) if tokens_BT is None else tokens_BT
    return processor(tokens, torch.tensor(logits_BV)).numpy()


@pytest.fixture
def processors():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.parametrize("k", [1, 2, 17, V, 10 * V])
def test_top_k_equals_transformers(processors, k):
    logits = random_logits(1)
    expected = processed(processors.TopKLogitsWarper(k), logits)
    np.testing.assert_array_equal(ops.keep_top_k(logits, k), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_equals_transformers(processors, p):
    logits = random_logits(2)
    expected = processed(processors.TopPLogitsWarper(p), logits)
    np.testing.assert_array_equal(ops.keep_top_p(logits, p), expected)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.7, 1.0])
def test_min_p_equals_transformers(processors, p):
    logits = random_logits(3)
    expected = processed(processors.MinPLogitsWarper(p), logits)
    np.testing.assert_array_equal(ops.keep_min_p(logits, p), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(processors, penalty):
    torch = pytest.importorskip("torch")
    logits = random_logits(4)
    tokens = np.random.default_rng(4).integers(0, V, (B, 9))
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    processor = processors.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processed(processor, logits, torch.tensor(tokens))
    # torch multiplies by the reciprocal, which rounds once more: one unit in the last place.
    np.testing.assert_allclose(
        ops.penalize_repetition(logits, seen, penalty), expected, rtol=1.2e-7, atol=0
    )


def test_the_whole_chain_draws_from_the_distribution_of_transformers(processors):
    """The frequencies of many draws match softmax of the processed logits."""
    torch = pytest.importorskip("torch")
    logits, num_draws = random_logits(5, (1, V)), 40_000
    seen = np.random.default_rng(5).random((1, V)) < 0.3
    chain = processors.LogitsProcessorList(
        [
            processors.RepetitionPenaltyLogitsProcessor(1.4),
            processors.TemperatureLogitsWarper(1.7),
            processors.TopKLogitsWarper(20),
            processors.TopPLogitsWarper(0.95),
            processors.MinPLogitsWarper(0.05),
        ]
    )
    processed_ = chain(torch.tensor(np.nonzero(seen[0])[0][None]), torch.tensor(logits))
    probabilities = torch.softmax(processed_, -1).numpy()[0]
    settings = ops.Sampling(1.7, 20, 0.95, 0.05, 1.4)
    keys = jax.random.split(jax.random.key(0), num_draws)
    repeat = lambda x: jnp.broadcast_to(x, (num_draws, V))  # noqa: E731
    tokens = jax.jit(ops.sample)(repeat(logits), keys, settings, repeat(seen))
    counts = np.bincount(tokens, minlength=V)
    assert counts[probabilities == 0].sum() == 0
    alive = probabilities > 0
    expected = num_draws * probabilities[alive]
    chi_square = ((counts[alive] - expected) ** 2 / expected).sum()
    degrees = alive.sum() - 1
    assert degrees >= 5
    # Four standard deviations above the mean of a chi-square with that many degrees of freedom.
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_settings_differ_by_row_and_off_changes_nothing():
    logits = random_logits(6)
    k = np.array([0, 1, 2, 3, 0, V, 2 * V])
    p = np.array([1.0, 0.2, 0.5, 1.0, 0.9, 0.1, 0.99], np.float32)
    for keep, settings, brute in [
        (ops.keep_top_k, k, brute_top_k),
        (ops.keep_top_p, p, brute_top_p),
        (ops.keep_min_p, 1 - p, brute_min_p),
    ]:
        expected = np.stack([brute(row, s) for row, s in zip(logits, settings)])
        np.testing.assert_array_equal(jax.jit(keep)(logits, settings), expected)
    for keep, off in [(ops.keep_top_k, 0), (ops.keep_top_p, 1.0), (ops.keep_min_p, 0.0)]:
        np.testing.assert_array_equal(keep(logits, off), logits)


def brute_top_k(row, k):
    kept = sorted(range(len(row)), key=lambda i: -row[i])[: k or len(row)]
    return np.where(np.isin(np.arange(len(row)), kept), row, -np.inf)


def brute_top_p(row, p):
    probabilities = np.exp(row - row.max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    kept, total = [], 0.0
    for token in sorted(range(len(row)), key=lambda i: -row[i]):
        if p < 1 and total >= p:
            break
        kept.append(token)
        total += probabilities[token]
    return np.where(np.isin(np.arange(len(row)), kept), row, -np.inf)


def brute_min_p(row, p):
    probabilities = np.exp(row - row.max(), dtype=np.float64)
    return np.where(probabilities >= p, row, -np.inf)


def test_temperature_zero_is_argmax_whatever_else_is_set():
    logits = random_logits(7)
    keys = jax.random.split(jax.random.key(0), B)
    tokens = ops.sample(logits, keys, ops.Sampling(0.0, 5, 0.5, 0.1), np.zeros((B, V), bool))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    mixed = ops.Sampling(np.array([0, 1, 0, 1, 0, 1, 0], np.float32))
    tokens = ops.sample(logits, keys, mixed, np.zeros((B, V), bool))
    np.testing.assert_array_equal(tokens[::2], logits.argmax(-1)[::2])


def test_a_row_is_drawn_alike_alone_and_in_a_batch():
    logits = random_logits(8)
    keys = jax.random.split(jax.random.key(1), B)
    settings = ops.Sampling(0.9, 30, 0.95)
    none = np.zeros((B, V), bool)
    together = ops.sample(logits, keys, settings, none)
    alone = [ops.sample(logits[i : i + 1], keys[i : i + 1], settings, none[:1]) for i in range(B)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_another_setting_is_not_another_program():
    logits, seen = random_logits(9), np.zeros((B, V), bool)
    keys = jax.random.split(jax.random.key(1), B)
    traces = []

    @jax.jit
    def draw(*args):
        traces.append(1)
        return ops.sample(*args)

    for temperature, k, p in [(0.0, 0, 1.0), (0.5, 3, 0.9), (2.0, 9, 0.2)]:
        draw(logits, keys, ops.Sampling(temperature, k, p, 0.1, 1.2), seen)
    assert len(traces) == 1
