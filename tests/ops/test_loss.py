"""Cross entropy and its reductions against torch and brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.core.mesh import MeshShape, batch_sharding, make_mesh, param_sharding
from lm.ops.loss import cross_entropy, head_cross_entropy, nll, nll_report, token_nll
from lm.train.hlo import collectives

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
    grad = jax.grad(lambda x: cross_entropy(x, jnp.asarray(targets), jnp.asarray(weights)).loss)
    grads = grad(jnp.asarray(logits))
    assert jnp.isfinite(grads).all()
    assert (grads[weights == 0] == 0).all()
    assert (jnp.abs(grads[weights == 1]).max(-1) > 0).all()


@pytest.mark.parametrize("smoothing, z_loss", [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3)])
def test_regularisers_equal_torch(smoothing, z_loss):
    """Label smoothing as torch's, and the square of ln Z; the gradient too."""
    logits, targets, weights = case()
    options = dict(label_smoothing=smoothing, z_loss=z_loss)
    theirs = torch.from_numpy(logits).requires_grad_()
    smooth = torch.nn.functional.cross_entropy(
        theirs.transpose(1, 2),
        torch.from_numpy(targets).long(),
        reduction="none",
        label_smoothing=smoothing,
    )
    total = smooth + z_loss * torch.logsumexp(theirs, -1) ** 2
    expected = (total * torch.from_numpy(weights)).sum()
    expected.backward()

    def loss(logits):
        sums = cross_entropy(logits, jnp.asarray(targets), jnp.asarray(weights), **options)
        return sums.loss, sums.nll

    (ours, plain), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad, atol=1e-6)
    np.testing.assert_allclose(plain, (their_nll(logits, targets).numpy() * weights).sum(), 1e-6)


def test_equal_logits_are_won_by_the_first():
    """As argmax: of two likeliest tokens the first is predicted."""
    logits = np.round(case()[0])  # Many ties.
    best = logits.argmax(-1)
    targets = np.where(np.arange(T) % 2, best, V - 1 - logits[..., ::-1].argmax(-1))
    assert (targets != best).any() and (logits == logits.max(-1, keepdims=True)).sum() > B * T
    sums = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.ones((B, T)))
    assert sums.correct == (targets == best).sum()


def head_case(D: int = 5, length: int = T, vocab_size: int = V):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    targets = jnp.asarray(rng.integers(0, vocab_size, (B, length)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, (B, length)) * rng.integers(0, 2, (B, length)))
    head = {"kernel": draw(D, vocab_size), "bias": draw(vocab_size)}
    return head, draw(B, length, D), targets, weights.astype(jnp.float32)


def head_loss(chunk_bytes, head, x, targets, weights, **options):
    """The loss of a linear head whose logits are soft-capped, as Gemma's are."""

    def unembed(x):
        return 5 * jnp.tanh((x @ head["kernel"] + head["bias"]) / 5)

    options["chunk_bytes"] = chunk_bytes
    sums = head_cross_entropy(unembed, x, targets, weights, head["bias"].size, **options)
    return sums.loss, sums


@pytest.mark.parametrize("places", [1, 3, T])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1, z_loss=1e-2)])
def test_chunks_equal_the_whole(places, options):
    """Sums and gradients, whether the length divides or not; traced weights, jitted."""
    args = head_case()

    def run(chunk_bytes):
        def loss(*args):
            return head_loss(chunk_bytes, *args, **options)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args)

    ((_, sums), grads), ((_, expected), others) = run(4 * B * V * places), run(1 << 30)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, expected)

    def close(a, b):
        return np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))

    jax.tree.map(close, grads, others)
    _, alone = jax.jit(lambda *args: head_loss(4 * B * V, *args, **options))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, expected)


def cost(chunk_bytes, trained):
    """FLOPs and bytes of temporaries of the gradient, for a vocabulary of 8,192 and 512 places."""
    head, *rest = head_case(32, 512, 8192)

    def loss(*args):
        return head_loss(chunk_bytes, *args)[0]

    grad = jax.jit(jax.grad(loss, trained)).lower(head, *rest).compile()
    return grad.cost_analysis()["flops"], grad.memory_analysis().temp_size_in_bytes


@pytest.mark.perf
def test_logits_of_all_places_are_never_held():
    """Temporaries are a few chunks, where the whole logits take 64 MiB."""
    logits = 4 * B * 512 * 8192
    _, whole = cost(1 << 30, (0, 1))
    _, chunked = cost(logits // 32, (0, 1))
    assert whole >= logits
    assert chunked <= logits // 4


@pytest.mark.perf
def test_a_head_that_does_not_train_gets_no_gradient():
    """A third of the products is spared: logits, and their gradient for x; none for the head."""
    logits = 4 * B * 512 * 8192
    both, _ = cost(logits // 2, (0, 1))
    states, _ = cost(logits // 2, 1)
    product = 2 * B * 512 * 32 * 8192 / 2  # XLA counts the body of a loop once.
    assert both - states >= product


@pytest.mark.parametrize("mesh", [MeshShape(data=8), MeshShape(data=1, fsdp=8)])
def test_devices_share_the_chunks(mesh):
    """As many chunks as a device's own rows take, and in each the gradient of the head added up.

    What is sent besides is the head, once, and no logits: the gradient of the hidden states, which
    is asked for divided along D, is laid out so when it is whole.
    """
    mesh = make_mesh(mesh)
    rows, length, features, vocab = 16, 64, 32, 128
    at_once, head_bytes = 16, 4 * features * vocab

    def loss(head, x, targets, weights):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return head_cross_entropy(
                lambda x: x @ head, x, targets, weights, vocab, chunk_bytes=at_once * 4 * vocab * 2
            ).loss

    divided = mesh.shape["fsdp"] > 1
    by_rows = batch_sharding(mesh)
    by_features = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    head = param_sharding(mesh, ("embed", "vocab"), (features, vocab), "head")
    step = jax.jit(
        jax.grad(loss, (0, 1)),
        in_shardings=(head, by_rows, by_rows, by_rows),
        out_shardings=(head, by_features if divided else by_rows),
    )
    place = (rows, length)
    shapes = ((features, vocab), (*place, features), place, place)
    kinds = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    text = step.lower(*map(jax.ShapeDtypeStruct, shapes, kinds)).compile().as_text()
    found = {each.kind: (each.count, each.bytes) for each in collectives(text)}
    chunks, share = length // at_once, 7 / 8
    expected = {"all-reduce": (chunks, chunks * 2 * head_bytes * share)}
    if divided:
        hidden_bytes = 4 * rows * length * features / 8
        expected |= {
            "all-gather": (1, head_bytes * share),
            "all-to-all": (1, hidden_bytes * share),
        }
    assert found == expected
