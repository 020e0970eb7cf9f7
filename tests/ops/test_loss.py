"""Cross entropy and its reductions against torch and brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops.loss import cross_entropy, nll, nll_report, token_nll

torch = pytest.importorskip("torch")
B, T, V = 4, 7, 11


def case(seed: int = 0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, T, V), scale=3).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(np.float32)
    return logits, targets, weights


def their_nll(logits, targets):
    """The original's loss: NLLLoss(reduction='none') of log_softmax over (B, V, T)."""
    log_probs = torch.nn.functional.log_softmax(torch.from_numpy(logits), dim=-1)
    loss = torch.nn.NLLLoss(reduction="none")
    return loss(log_probs.transpose(1, 2), torch.from_numpy(targets).long())


@pytest.mark.ledger("B68")
@pytest.mark.parametrize("seed", range(5))
def test_reductions_equal_torch(seed):
    """'sum' is the total, 'mean' sums over tokens and averages over the batch; both maskings."""
    logits, targets, weights = case(seed)
    nll_BT = token_nll(jnp.asarray(logits), jnp.asarray(targets))
    theirs = their_nll(logits, targets)
    total = torch.nn.NLLLoss(reduction="sum")(
        torch.nn.functional.log_softmax(torch.from_numpy(logits), -1).reshape(-1, V),
        torch.from_numpy(targets).long().reshape(-1),
    )
    for mask in (None, weights):
        masked = theirs if mask is None else theirs * torch.from_numpy(mask)
        count = B * T if mask is None else mask.sum()
        weighed = None if mask is None else jnp.asarray(mask)
        expected = {
            "sum": masked.sum().item(),
            "mean": masked.sum(1).mean(0).item(),
            "token": masked.sum().item() / count,
        }
        for reduction, value in expected.items():
            assert abs(float(nll(nll_BT, weighed, reduction)) / value - 1) <= 1e-5
    assert abs(float(nll(nll_BT)) / total.item() - 1) <= 1e-5


@pytest.mark.ledger("B68")
def test_report_labels_every_reduction():
    logits, targets, weights = case()
    nll_BT = token_nll(jnp.asarray(logits), jnp.asarray(targets))
    theirs = their_nll(logits, targets).numpy()
    report = nll_report(nll_BT, jnp.asarray(weights), num_chars=13)
    real = (theirs * weights).sum()
    expected = {
        "nats_total": real,
        "nats_per_sequence": real / B,
        "nats_per_token": real / weights.sum(),
        "nats_total_with_padding": theirs.sum(),
        "nats_per_sequence_with_padding": theirs.sum() / B,
        "nats_per_token_with_padding": theirs.mean(),
        "bits_per_char": real / math.log(2) / 13,
    }
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(report[name] / value - 1) <= 1e-5, name


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'average'"):
        nll(jnp.ones((1, 1)), None, "average")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_equal_torch(dtype):
    """Whatever the dtype of the logits, the sums are those of their fp32 values."""
    logits, targets, weights = case()
    logits = np.array(jnp.asarray(logits, dtype).astype(jnp.float32))
    sums = cross_entropy(jnp.asarray(logits, dtype), jnp.asarray(targets), jnp.asarray(weights))
    theirs = their_nll(logits, targets).numpy() * weights
    assert sums.nll.dtype == jnp.float32
    np.testing.assert_allclose(sums.nll, theirs.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, (weights * (logits.argmax(-1) == targets)).sum())
    assert sums.weight == weights.sum()


def test_places_of_weight_zero_have_no_gradient():
    """Exactly none, even where their logits are not finite."""
    logits, targets, weights = case()
    logits[weights == 0] = np.inf
    grad = jax.grad(lambda x: cross_entropy(x, jnp.asarray(targets), jnp.asarray(weights)).nll)
    grads = grad(jnp.asarray(logits))
    assert jnp.isfinite(grads).all()
    assert (grads[weights == 0] == 0).all()
    assert (jnp.abs(grads[weights == 1]).max(-1) > 0).all()
