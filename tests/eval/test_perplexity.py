"""Evaluation against torch, plain loops in float64, and sums that single precision would lose."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.context import Context
from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.eval.perplexity import evaluate, text_size
from tests.conformance.harness import forward, tiny

B = 6


def rows_of_text(length, num_batches=3, seed=0):
    """Batches of one document a row, as teenyGPT reads them: 28 begins, 0 ends and pads."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(num_batches):
        full = np.zeros((B, length + 1), np.int32)
        weights = np.zeros((B, length), np.float32)
        for row in range(B):
            n = rng.integers(1, length)
            full[row, 0], full[row, 1 : n + 1] = 28, rng.integers(1, 28, n)
            weights[row, : n + 1] = 1  # The end of the text is predicted too.
        segments = weights.astype(np.int32)
        positions = np.where(segments != 0, np.arange(length), 0)
        batches.append(Batch(full[:, :-1], full[:, 1:], weights, segments, positions))
    return batches


def logits_of(model, params, batch):
    """The model as the seed runs it: padding is text."""
    return np.asarray(forward(model, params, jnp.asarray(batch.tokens), Context())[0])


@pytest.mark.ledger("B69")
@pytest.mark.parametrize("length", [64, 50])
def test_top1_rec_equals_the_original_s_formula_in_torch(length):
    torch = pytest.importorskip("torch")
    model, params = tiny("teeny_gpt")
    batches = rows_of_text(length)
    unmasked, masked = torch.zeros((), dtype=torch.float64), 0.0
    for batch in batches:
        logits = torch.tensor(logits_of(model, params, batch))
        hit = (logits.argmax(-1) == torch.tensor(batch.targets)).double()
        real = torch.tensor(batch.weights).double()
        unmasked += hit.mean(dim=1).sum()
        masked += ((hit * real).sum(1) / real.sum(1)).sum()
    sequences = len(batches) * B
    ours = evaluate(model, params, batches)
    assert ours["sequences"] == sequences
    # Fractions of 64 are exact in any order of summation, others to the last bit of single.
    exact = float if length == 64 else np.float32
    assert 0 < ours["top1_rec_unmasked"] < 1
    assert exact(ours["top1_rec_unmasked"]) == exact(unmasked.item() / sequences)
    assert np.float32(ours["top1_rec_masked"]) == np.float32(masked.item() / sequences)
    assert ours["top1_rec_masked"] != ours["top1_rec_unmasked"]


def test_loss_perplexity_and_bits():
    model, params = tiny("teeny_gpt")
    tokenizer = teeny_gpt_tokenizer()
    batches = rows_of_text(40)
    nats = hits = places = characters = 0
    for batch in batches:
        logits = logits_of(model, params, batch).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = np.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
        real = batch.weights > 0
        nats -= found[real].sum()
        hits += (logits.argmax(-1) == batch.targets)[real].sum()
        places += real.sum()
        characters += (batch.targets[real] != 0).sum()
    assert places == characters + len(batches) * B
    ours = evaluate(model, params, batches, tokenizer=tokenizer)
    assert ours["loss"] == pytest.approx(nats / places, rel=1e-6)
    assert ours["perplexity"] == pytest.approx(math.exp(nats / places), rel=1e-5)
    assert ours["bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-6)
    assert ours["bits_per_byte"] == ours["bits_per_character"]
    assert ours["accuracy"] == hits / places
    assert (ours["tokens"], ours["characters"]) == (places, characters)
    assert "bits_per_character" not in evaluate(model, params, batches)
    two = evaluate(model, params, batches[:2])
    assert evaluate(model, params, iter(batches), max_batches=2) == two


def test_bytes_are_not_characters_and_documents_are_decoded_apart():
    class Greek:
        """Two ids make one letter, and 0 ends the text, whatever comes behind."""

        eos_id = 0

        def decode(self, ids):
            assert 0 not in ids
            return "".join("αβγ"[a % 3] for a, _ in zip(ids[::2], ids[1::2]))

    targets = np.array([[5, 6, 7, 8, 0, 3, 0], [9, 9, 0, 1, 1, 1, 1]], np.int32)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0, 0]], np.int32)
    batch = Batch(targets, targets, (segments > 0).astype(np.float32), segments)
    assert text_size(batch, Greek()) == (3, 6)


def test_packed_documents_and_empty_rows():
    """Two documents in a row count as one sequence, a row without weight as none."""
    model, params = tiny("llama")
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, model.vocab_size, (2, 13)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 12], np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype(np.float32), segments)
    nats = 0.0
    for part in (slice(0, 5), slice(5, 9)):
        logits, _ = forward(model, params, jnp.asarray(batch.tokens[:1, part]), Context())
        log_probs = np.asarray(jax.nn.log_softmax(logits)[0])
        nats -= sum(log_probs[i, t] for i, t in enumerate(batch.targets[0, part]))
    ours = evaluate(model, params, [batch])
    assert ours["loss"] == pytest.approx(float(nats) / 9, rel=1e-5)
    assert (ours["sequences"], ours["tokens"]) == (1, 9)


def big(model, params, batch, ctx, key):
    """An objective whose sums outgrow the integers that single precision holds."""
    ones = jnp.float32(1.0)
    nats = jnp.where(batch.labels[0] == 0, jnp.float32(2**25), ones)
    return nats, ones, {"half": (nats / 2, ones), "seen": (batch.weights.sum(), jnp.int32(1))}


def test_an_objective_s_sums_lose_nothing():
    model, params = tiny("teeny_gpt")
    batch = rows_of_text(8, 1)[0]
    batches = [batch.replace(labels=np.array([index])) for index in range(1001)]
    ours = evaluate(model, params, batches, big)
    assert ours["loss"] == (2**25 + 1000) / 1001
    assert ours["half"] == ours["loss"] / 2
    assert ours["seen"] == pytest.approx(batch.weights.sum())
    assert sum([np.float32(1)] * 1000, np.float32(2**25)) != 2**25 + 1000


def test_bad_input_gets_a_clear_sentence():
    model, params = tiny("teeny_gpt")
    with pytest.raises(ValueError, match="no batches"):
        evaluate(model, params, [])
    batch = rows_of_text(8, 1)[0]
    with pytest.raises(ValueError, match="no place of the split has any weight"):
        evaluate(model, params, [batch.replace(weights=0 * batch.weights)])
    with pytest.raises(ValueError, match="evaluate it by an objective"):
        evaluate(SimpleNamespace(causal=False), params, [batch])


def test_one_program_and_one_read(monkeypatch):
    model, params = tiny("teeny_gpt")
    reads = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(1) or device_get(x))
    evaluate(model, params, rows_of_text(24, 5))
    assert len(reads) == 1
