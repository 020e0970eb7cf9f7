"""Heads for tasks equal their Hugging Face classes: logits, losses, gradients, in and out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.context import Context
from lm.models.families import bert, gpt2, llama, t5
from lm.models.zoo import family_of
from lm.train.objectives import Choice, Conditional, Span, Tags

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf  # noqa: E402

ROWS, LENGTH, PAD, NUM_LABELS = 4, 12, 5, 3
SMALL = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)
CONFIGS = {
    "GPT2": dict(vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=4, pad_token_id=0),
    "Llama": SMALL | dict(max_position_embeddings=40, num_key_value_heads=2, pad_token_id=0),
    "Mistral": SMALL
    | dict(max_position_embeddings=40, num_key_value_heads=2, pad_token_id=0, sliding_window=5),
    "Bert": SMALL | dict(max_position_embeddings=40),
    "T5": dict(
        vocab_size=61, d_model=32, num_heads=4, d_kv=8, num_layers=2, d_ff=48,
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
FAMILIES = {"GPT2": gpt2, "Llama": llama, "Mistral": llama, "Bert": bert, "T5": t5}
DECODERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
CLASSES = [
    *((family, ending) for family in ("GPT2", "Llama", "Mistral", "Bert") for ending in DECODERS),
    ("Bert", "ForMultipleChoice"),
    *(("T5", ending) for ending in DECODERS),
]


def make_torch(family: str, ending: str):
    labels = {} if ending in ("ForQuestionAnswering", "ForMultipleChoice") else {"num_labels": 3}
    name = f"{family}{ending}"
    config = getattr(transformers, f"{family}Config")(
        **CONFIGS[family], **labels, architectures=[name]
    )
    return hf.randomize(getattr(transformers, name)(config))


def make_batch(ending: str, padding: int = PAD) -> Batch:
    """Rows of random tokens; the last ones end in padding; the last token is T5's end token."""
    rng = np.random.default_rng(1)
    shape = (ROWS, 2, LENGTH) if ending == "ForMultipleChoice" else (ROWS, LENGTH)
    segments = np.ones(shape, np.int32)
    if padding:
        segments[-2:, ..., -padding:] = 0
    tokens = rng.integers(3, 61, shape).astype(np.int32)
    tokens = np.where(np.roll(segments, -1, -1) * (np.arange(LENGTH) < LENGTH - 1), tokens, 1)
    tokens = np.where(segments, tokens, 0).astype(np.int32)
    weights = (segments * rng.integers(0, 2, shape)).astype(np.float32)
    targets = rng.integers(0, NUM_LABELS, shape).astype(np.int32)
    labels = rng.integers(0, 2, ROWS).astype(np.int32)
    if ending == "ForQuestionAnswering":
        labels = np.sort(rng.integers(0, LENGTH - PAD, (ROWS, 2)).astype(np.int32), axis=1)
    return Batch(tokens, targets, weights, segments, labels=labels)


def torch_inputs(ending: str, batch: Batch) -> dict:
    inputs = dict(input_ids=batch.tokens, attention_mask=batch.segments)
    if ending == "ForTokenClassification":
        inputs["labels"] = np.where(batch.weights > 0, batch.targets, -100)
    elif ending == "ForQuestionAnswering":
        assert batch.labels is not None
        inputs |= dict(start_positions=batch.labels[:, 0], end_positions=batch.labels[:, 1])
    else:
        inputs["labels"] = batch.labels
    return {name: torch.from_numpy(np.asarray(array)).long() for name, array in inputs.items()}


OBJECTIVES = {
    "ForSequenceClassification": Conditional(),
    "ForTokenClassification": Tags(),
    "ForQuestionAnswering": Span(),
    "ForMultipleChoice": Choice(),
}


@pytest.mark.ledger("L58", "N54")
@pytest.mark.parametrize("family, ending", CLASSES)
def test_equals_transformers(family, ending):
    """Logits, the class's own loss and its gradients, with padding, and the way in and out."""
    module = make_torch(family, ending)
    table = FAMILIES[family].FAMILY
    model, params = hf.import_torch(table, module)
    hf.assert_counts(module, params)
    hf.assert_round_trip(table, module, model, params)
    assert table.write_config(model)["architectures"] == [f"{family}{ending}"]
    assert family_of(model) is table
    batch = make_batch(ending)
    out = module(**torch_inputs(ending, batch))
    if ending == "ForQuestionAnswering":
        theirs = torch.stack([out.start_logits, out.end_logits], -1)
        # Hugging Face's softmax counts padding among the places where an answer may be.
        hidden = torch.from_numpy(batch.segments == 0)[..., None]
        nll = -torch.log_softmax(theirs.masked_fill(hidden, -1e30), 1)
        index = torch.from_numpy(batch.labels).long()[:, None]
        loss = nll.gather(1, index).mean()
    else:
        theirs, loss = out.logits, out.loss
    loss.backward()
    ctx = Context(segments_BT=jnp.asarray(batch.segments.reshape(-1, LENGTH)))
    ours = jax.jit(partial(model.apply, method="classify"))(
        {"params": params}, batch.tokens.reshape(-1, LENGTH), ctx
    )
    difference = np.asarray(ours).reshape(theirs.shape) - theirs.detach().numpy()
    if theirs.ndim == 3:
        difference = difference * (batch.segments != 0)[..., None]
    assert np.abs(difference).max() <= 1e-5

    def mean_loss(params):
        total, weight, _ = OBJECTIVES[ending](model, params, batch, Context(), jax.random.key(0))
        return total / weight

    value, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert abs(float(value) - loss.item()) <= 1e-5
    hf.assert_gradients(table, module, model, params, grads, 1e-5)


@pytest.mark.ledger("L58")
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Bert", "T5"])
def test_span_loss_without_padding_is_transformers_own(family):
    module = make_torch(family, "ForQuestionAnswering")
    model, params = hf.import_torch(FAMILIES[family].FAMILY, module)
    batch = make_batch("ForQuestionAnswering", padding=0)
    loss = module(**torch_inputs("ForQuestionAnswering", batch)).loss
    total, weight, _ = jax.jit(
        lambda params: Span()(model, params, batch, Context(), jax.random.key(0))
    )(params)
    assert abs(float(total / weight) - loss.item()) <= 1e-5


@pytest.mark.ledger("L58", "N54")
def test_bert_reads_sentence_pairs():
    """Token types reach the classifier as they do there."""
    module = make_torch("Bert", "ForSequenceClassification")
    model, params = hf.import_torch(bert.FAMILY, module)
    batch = make_batch("ForSequenceClassification")
    types = (np.arange(LENGTH) > 4).astype(np.int32) * batch.segments
    inputs = torch_inputs("ForSequenceClassification", batch)
    theirs = module(**inputs, token_type_ids=torch.from_numpy(types).long()).logits
    ctx = Context(segments_BT=jnp.asarray(batch.segments), token_types_BT=jnp.asarray(types))
    ours = jax.jit(partial(model.apply, method="classify"))({"params": params}, batch.tokens, ctx)
    assert np.abs(np.asarray(ours) - theirs.detach().numpy()).max() <= 1e-5
