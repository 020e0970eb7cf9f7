"""The objectives against torch, Hugging Face, enumeration and brute force."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.context import Context
from lm.core.paths import flatten, map_with_path, partition
from lm.layers.head import Labels
from lm.layers.pool import LastToken
from lm.models import params as P
from lm.models.decoder import Decoder
from lm.models.families import bert, gpt2
from lm.models.families.teeny_gpt import teeny_gpt
from lm.ops.loss import cross_entropy
from lm.train.objectives import AlphaMix, Conditional, Generative, Joint, Masked

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity.hf import import_torch, randomize  # noqa: E402

B, T, V = 3, 10, 13
KEY = jax.random.key(5)
MASKED = Masked(mask_id=V - 1, special_ids=(0, 1), rate=0.4)


@partial(jax.jit, static_argnums=(0, 1))
def compute(objective, model, params, batch, ctx, key):
    return objective(model, params, batch, ctx, key)


def make_model(**changes):
    sizes = dict(vocab_size=V, max_length=T, num_features=16, num_heads=2, num_layers=2)
    return teeny_gpt(**sizes | dict(mlp_multiplier=2) | changes)


def random_params(model):
    """Every parameter random, norms and biases too."""
    return map_with_path(
        lambda path, x: x + 0.2 * jax.random.normal(jax.random.key(len(path)), x.shape),
        P.init(model, jax.random.key(0)),
    )


def random_batch(seed: int = 0, rows: int = B, length: int = T, vocab_size: int = V) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab_size - 1, (rows, length)).astype(np.int32)
    segments = (np.arange(length) < rng.integers(4, length + 1, (rows, 1))).astype(np.int32)
    targets = np.concatenate([tokens[:, 1:], tokens[:, :1]], 1)
    labels = rng.integers(0, 4, rows).astype(np.int32)
    batch = Batch(tokens, targets, segments.astype(np.float32), segments, labels=labels)
    return jax.tree.map(jnp.asarray, batch)


# --- generative ------------------------------------------------------------------------------


@pytest.mark.ledger("B40")
@pytest.mark.parametrize("padded", [False, True])
def test_generative_equals_hugging_face(padded):
    """The mean loss of GPT2LMHeadModel, with labels -100 where padding is not counted."""
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2, n_inner=32
    )
    module = randomize(transformers.GPT2LMHeadModel(config))
    model, params = import_torch(gpt2.FAMILY, module)
    rng = np.random.default_rng(1)
    text = rng.integers(0, V, (B, T)).astype(np.int32)
    mask = np.ones((B, T), np.int32)
    if padded:
        mask[1:, -4:] = 0
    labels = torch.from_numpy(np.where(mask, text, -100)).long()
    with torch.no_grad():
        theirs = module(
            input_ids=torch.from_numpy(text).long(),
            attention_mask=torch.from_numpy(mask),
            labels=labels,
        ).loss.item()
    batch = Batch(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        weights=mask[:, 1:].astype(np.float32),
        segments=mask[:, :-1],
    )
    loss, weight, metrics = compute(Generative(), model, params, batch, Context(), KEY)
    assert weight == mask[:, 1:].sum()
    assert abs(float(loss / weight) - theirs) <= 1e-5
    assert 0 <= metrics["accuracy"][0] <= metrics["accuracy"][1]


@pytest.mark.ledger("B40")
def test_generative_probabilities_sum_to_one():
    """Over all strings of length 3 on 5 tokens: sum of p(first) exp(-loss) is 1."""
    model = make_model(vocab_size=5)
    params = random_params(model)
    strings = np.array(list(itertools.product(range(5), repeat=3)), np.int32)
    first = np.array([0.1, 0.3, 0.2, 0.15, 0.25])

    def loss_of(tokens, targets):
        ones = jnp.ones((1, 2))
        batch = Batch(tokens[None], targets[None], ones, ones.astype(jnp.int32))
        return Generative()(model, params, batch, Context(), KEY)[0]

    losses = jax.jit(jax.vmap(loss_of))(strings[:, :-1], strings[:, 1:])
    total = (first[strings[:, 0]] * np.exp(-np.asarray(losses, np.float64))).sum()
    assert abs(total - 1) <= 1e-5


@pytest.mark.ledger("B40")
def test_padding_is_a_switch():
    """Counting padding is a matter of `weights`; what the text itself costs does not change."""
    model = make_model()
    params, batch = random_params(model), random_batch()
    counted = batch.replace(weights=jnp.ones_like(batch.weights))
    without, weight, _ = compute(Generative(), model, params, batch, Context(), KEY)
    with_padding, weight_all, _ = compute(Generative(), model, params, counted, Context(), KEY)
    assert weight < weight_all == B * T
    assert without < with_padding


# --- masked ----------------------------------------------------------------------------------


@pytest.mark.ledger("B39")
def test_masked_equals_hugging_face():
    """BertForMaskedLM with labels -100 elsewhere, on the tokens that we corrupted."""
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=T,
    )
    module = randomize(transformers.BertForPreTraining(config))
    model, params = import_torch(bert.FAMILY, module)
    masked_lm = transformers.BertForMaskedLM(config).eval()
    state = {k: v for k, v in module.state_dict().items() if k in masked_lm.state_dict()}
    masked_lm.load_state_dict(state, strict=True)
    batch = random_batch()
    loss, weight, _ = compute(MASKED, model, params, batch, Context(), KEY)
    corrupt_key, _ = jax.random.split(KEY)
    shown, chosen = MASKED.corrupt(batch.tokens, batch.segments, V, corrupt_key)
    labels = np.where(chosen, batch.tokens, -100)
    with torch.no_grad():
        theirs = masked_lm(
            input_ids=torch.from_numpy(np.array(shown)).long(),
            attention_mask=torch.from_numpy(np.array(batch.segments)),
            labels=torch.from_numpy(labels).long(),
        ).loss.item()
    assert weight == chosen.sum() > 0
    assert abs(float(loss / weight) - theirs) <= 1e-5


@pytest.mark.ledger("B39")
def test_masked_equals_brute_force():
    """Token by token: -ln softmax at each chosen place, given the text without the whole set."""
    model = make_model()
    params, batch = random_params(model), random_batch()
    loss, weight, _ = compute(MASKED, model, params, batch, Context(), KEY)
    corrupt_key, _ = jax.random.split(KEY)
    shown, chosen = MASKED.corrupt(batch.tokens, batch.segments, V, corrupt_key)
    ctx = Context(causal=False, segments_BT=batch.segments)
    logits = np.asarray(model.apply({"params": params}, shown, ctx)[0], np.float64)
    total = 0.0
    for row, place in zip(*np.nonzero(np.asarray(chosen))):
        scores = logits[row, place]
        target = int(batch.tokens[row, place])
        total -= scores[target] - math.log(sum(math.exp(s) for s in scores))
    assert abs(float(loss) - total) / total <= 1e-5
    assert float(weight) == np.asarray(chosen).sum()


@pytest.mark.ledger("B39")
def test_unmasked_places_have_no_gradient_through_the_head():
    """The gradient of what the head reads is exactly 0 at every place that was not chosen."""
    model = make_model()
    params, batch = random_params(model), random_batch()
    corrupt_key, _ = jax.random.split(KEY)
    _, chosen = MASKED.corrupt(batch.tokens, batch.segments, V, corrupt_key)

    class Probe:
        """The model, with something to add to its hidden states."""

        vocab_size = V

        def __init__(self, extra):
            self.extra = extra

        def apply(self, *args, method, **kwargs):
            result = model.apply(*args, method=method, **kwargs)
            return (result[0] + self.extra, None) if method == "hidden" else result

    grad = jax.grad(lambda extra: MASKED(Probe(extra), params, batch, Context(), KEY)[0])
    grads = grad(jnp.zeros((B, T, 16)))
    assert (grads[~chosen] == 0).all()
    assert (jnp.abs(grads[chosen]).max(-1) > 0).all()


class EveryPlace(Masked):
    """The same loss, its head computed at every place and weighed afterwards."""

    def __call__(self, model, params, batch, ctx, key):
        corrupt_key, dropout_key = jax.random.split(key)
        shown, chosen = self.corrupt(batch.tokens, batch.segments, model.vocab_size, corrupt_key)
        ctx = ctx.replace(segments_BT=batch.segments, causal=False)
        logits, _ = model.apply({"params": params}, shown, ctx, rngs={"dropout": dropout_key})
        sums = cross_entropy(logits, batch.tokens, chosen.astype(jnp.float32))
        return sums.loss, sums.weight, {"masked_accuracy": (sums.correct, sums.weight)}


@pytest.mark.slow
@pytest.mark.ledger("L59")
@pytest.mark.parametrize("rate", [0.15, 1.0])
def test_head_at_masked_places_equals_head_everywhere(rate):
    """Loss, counts and gradients; no row lacks a place that was drawn."""
    model = bert.FAMILY.build(**bert.FAMILY.tiny, heads="masked", dropout=0.1)
    params = random_params(model)
    batch = random_batch(rows=4, length=32, vocab_size=61)
    options = dict(mask_id=60, rate=rate)
    ctx = Context(deterministic=False)

    def run(objective):
        def loss(params):
            total, *rest = objective(model, params, batch, ctx, KEY)
            return total, rest

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (ours, counts), grads = run(Masked(**options))
    (theirs, expected), other = run(EveryPlace(**options))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert counts == expected and counts[0] > 0
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other))
    for path, leaf in flatten(other).items():
        np.testing.assert_allclose(flatten(grads)[path], leaf, atol=1e-6 * scale, err_msg=path)


@pytest.mark.ledger("L59")
def test_head_at_masked_places_costs_less():
    """Memory and FLOPs of a step as XLA counts them, over a vocabulary of BERT's size."""
    model = bert.FAMILY.build(**bert.FAMILY.tiny | dict(vocab_size=30522), heads="masked")
    batch = random_batch(rows=4, length=128, vocab_size=30522)

    def cost(objective):
        step = jax.jit(jax.grad(lambda p: objective(model, p, batch, Context(), KEY)[0]))
        compiled = step.lower(P.abstract(model)).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    (flops, memory), (all_flops, all_memory) = map(cost, (Masked(mask_id=3), EveryPlace(mask_id=3)))
    assert flops < 0.5 * all_flops
    assert memory < 0.5 * all_memory


def test_a_row_has_no_more_masked_places_than_the_head_has():
    masked = Masked(mask_id=3, rate=0.15)
    assert masked.places(512) == 118 and Masked(mask_id=3, rate=1.0).places(7) == 7
    ones = jnp.ones((2000, 16), jnp.int32)
    _, chosen = jax.jit(masked.corrupt, static_argnums=2)(ones, ones, 61, KEY)
    assert chosen.sum(axis=1).max() <= masked.places(16)


@pytest.mark.ledger("L13")
def test_masking_rates():
    """Over 10^6 maskable tokens, each rate of BERT's within three standard deviations."""
    vocab_size, specials = 1000, (0, 1, 2)
    masked = Masked(mask_id=2, special_ids=specials)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (1100, 1024)).astype(np.int32)
    segments = (np.arange(1024) < rng.integers(900, 1025, (1100, 1))).astype(np.int32)
    shown, chosen = jax.jit(masked.corrupt, static_argnums=2)(tokens, segments, vocab_size, KEY)
    again, _ = jax.jit(masked.corrupt, static_argnums=2)(tokens, segments, vocab_size, KEY)
    shown, chosen = np.asarray(shown), np.asarray(chosen)
    np.testing.assert_array_equal(shown, again)
    other, _ = masked.corrupt(tokens, segments, vocab_size, jax.random.key(6))
    assert (np.asarray(other) != shown).any()

    special = np.isin(tokens, specials)
    assert not chosen[special].any() and not chosen[segments == 0].any()
    np.testing.assert_array_equal(shown[~chosen], tokens[~chosen])
    maskable = (~special & (segments == 1)).sum()
    assert maskable >= 10**6

    def within(count: int, total: int, rate: float) -> bool:
        return abs(count - total * rate) <= 3 * math.sqrt(total * rate * (1 - rate))

    total = chosen.sum()
    assert within(total, maskable, 0.15)
    # A random draw is the mask, or the token itself, once in a thousand times each.
    is_mask, is_same = shown[chosen] == 2, shown[chosen] == tokens[chosen]
    drawn = 0.1 / vocab_size
    assert within(is_mask.sum(), total, 0.8 + drawn)
    assert within(is_same.sum(), total, 0.1 + drawn)
    assert within((~is_mask & ~is_same).sum(), total, 0.1 - 2 * drawn)
    draws = shown[chosen & (shown != 2) & (shown != tokens)]
    counts = np.bincount(draws, minlength=vocab_size)[3:]
    assert counts.min() > 0 and abs(counts.mean() / (len(draws) / vocab_size) - 1) < 0.01


def test_a_mask_outside_of_the_vocabulary_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="mask_id 13"):
        Masked(V)(model, P.init(model, KEY), random_batch(), Context(), KEY)


# --- mixtures --------------------------------------------------------------------------------


@pytest.mark.ledger("B41")
@pytest.mark.slow
def test_alpha_mix():
    """Its value and its gradient are those of the two losses, mixed, for one set of parameters."""
    model = make_model()
    params, batch = random_params(model), random_batch()
    gen_key, masked_key = jax.random.split(KEY)

    def value_and_grad(objective, ctx, key):
        def loss(params):
            loss_sum, weight, _ = objective(model, params, batch, ctx, key)
            return loss_sum, weight

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (gen, gen_weight), gen_grads = value_and_grad(Generative(), Context(causal=True), gen_key)
    (masked, _), masked_grads = value_and_grad(MASKED, Context(causal=False), masked_key)
    for alpha in (0.0, 0.5, 1.0):
        (mix, weight), mix_grads = value_and_grad(AlphaMix(alpha, MASKED), Context(), KEY)
        assert weight == gen_weight
        np.testing.assert_allclose(mix, gen + alpha * masked, rtol=1e-6)
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(mix_grads))
        for path, leaf in flatten(mix_grads).items():
            expected = flatten(gen_grads)[path] + alpha * flatten(masked_grads)[path]
            np.testing.assert_allclose(leaf, expected, atol=1e-6 * scale, err_msg=path)


def classifier_model():
    model = make_model()
    return Decoder(
        model.embed,
        model.stack,
        model.head,
        max_length=T,
        pooler=LastToken(),
        classifier=Labels((4,)),
    )


def head_of(params):
    """phi is the label's head, theta all the rest."""
    return partition(params, lambda path: path.startswith("classifier/"))


@pytest.mark.slow
@pytest.mark.ledger("B42")
def test_joint_loss():
    """ln p(x, y) = ln p(x) + ln p(y | x); phi and theta both learn from it."""
    model = classifier_model()
    params, batch = random_params(model), random_batch()

    def loss(params, objective):
        return compute(objective, model, params, batch, Context(), KEY)[0]

    joint, grads = jax.value_and_grad(loss)(params, Joint())
    parts = loss(params, Generative()) + loss(params, Conditional())
    np.testing.assert_allclose(joint, parts, rtol=1e-6)
    phi, theta = head_of(grads)
    for leaves in (phi, theta):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(leaves)) > 1e-3
    # The label alone: a brute-force softmax over the hidden state of each row's last token.
    hidden, _ = model.apply(
        {"params": params}, batch.tokens, Context(segments_BT=batch.segments), method="hidden"
    )
    expected = 0.0
    for row in range(B):
        last = int(batch.segments[row].sum()) - 1
        kernel, bias = (params["classifier"][name] for name in ("kernel", "bias"))
        scores = np.asarray(hidden[row, last] @ kernel + bias, np.float64)
        expected -= scores[int(batch.labels[row])] - np.log(np.exp(scores).sum())
    np.testing.assert_allclose(loss(params, Conditional()), expected, rtol=1e-5)


@pytest.mark.ledger("B42")
def test_conditional_loss_is_ordinary_finetuning():
    """-ln p(y | x) alone: theta learns through phi, and the head over the vocabulary does not."""
    model = classifier_model()
    params, batch = random_params(model), random_batch()
    objective = Conditional()
    grads = jax.grad(lambda p: compute(objective, model, p, batch, Context(), KEY)[0])(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["head"]))
    phi, theta = head_of(grads)
    for leaves in (phi, theta):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(leaves)) > 1e-3
    with pytest.raises(ValueError, match="labels"):
        objective(model, params, batch.replace(labels=None), Context(), KEY)
