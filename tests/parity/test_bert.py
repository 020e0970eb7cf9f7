"""BERT equals its Hugging Face classes, with every set of heads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.models import params as P
from lm.models.encoder import TwoTower
from lm.models.families.bert import FAMILY, bert
from lm.models.foreign import read_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf  # noqa: E402

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
)
TYPES = np.array([[0] * 9 + [1] * 15, [0] * 5 + [1] * 12 + [0] * 7], np.int32)


def make_torch(name: str, **changes):
    config = transformers.BertConfig(**SIZES, **changes, architectures=[name])
    return hf.randomize(getattr(transformers, name)(config))


def run_torch(module, tokens, mask):
    out = module(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask),
        token_type_ids=torch.from_numpy(TYPES).long(),
    )
    names = ("prediction_logits", "logits", "last_hidden_state")
    places = next(out[name] for name in names if name in out)
    rows = out.get("seq_relationship_logits", out.get("pooler_output"))
    return places, rows


def run_ours(model, params, tokens, ctx):
    variables = {"params": params}
    apply = jax.jit(model.apply, static_argnames="method")
    places, _ = apply(variables, tokens, ctx, method="__call__" if model.head else "hidden")
    rows = None
    if model.pooler is not None:
        method = "pooled" if model.classifier is None else "classify"
        rows = apply(variables, tokens, ctx, method=method)
    return places, rows


@pytest.mark.ledger("B47", "L16")
@pytest.mark.parametrize(
    "name, changes",
    [
        ("BertForPreTraining", {}),
        pytest.param(
            "BertForPreTraining",
            dict(hidden_act="gelu_new", type_vocab_size=3, layer_norm_eps=1e-3),
            marks=pytest.mark.slow,
        ),
        ("BertForMaskedLM", {}),
        ("BertModel", {}),
    ],
)
def test_equals_transformers(name, changes):
    """Outputs of places and rows with padding and both token types, gradients, the way back."""
    module = make_torch(name, **changes)
    model, params = hf.import_torch(FAMILY, module)
    hf.assert_counts(module, params)
    hf.assert_round_trip(FAMILY, module, model, params)
    tokens, mask = hf.ids(61), hf.right_padded()
    ctx = Context(segments_BT=jnp.asarray(mask), token_types_BT=jnp.asarray(TYPES))
    module.zero_grad()
    theirs = run_torch(module, tokens, mask)

    def torch_loss(places, rows):
        loss = (torch.log_softmax(places, -1)[..., 7] * torch.from_numpy(mask)).sum() / mask.sum()
        return loss if rows is None else loss + torch.log_softmax(rows, -1)[:, 1].mean()

    def loss(params):
        places, rows = run_ours(model, params, tokens, ctx)
        value = (jax.nn.log_softmax(places)[..., 7] * mask).sum() / mask.sum()
        if rows is not None:
            value += jax.nn.log_softmax(rows)[:, 1].mean()
        return value, (places, rows)

    torch_loss(*theirs).backward()
    (value, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    difference = np.asarray(ours[0]) - theirs[0].detach().numpy()
    assert np.abs(difference * mask[..., None]).max() <= 1e-4
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        assert np.abs(np.asarray(ours[1]) - theirs[1].detach().numpy()).max() <= 1e-5
    assert abs(float(value) - torch_loss(*theirs).item()) <= 1e-5
    hf.assert_gradients(FAMILY, module, model, params, grads)


@pytest.mark.ledger("L16")
def test_token_types_and_positions_are_read():
    """Each of the three tables that are summed at the entry moves the output."""
    model, params = hf.import_torch(FAMILY, make_torch("BertModel"))
    tokens = hf.ids(61)

    def hidden(**ctx):
        return apply({"params": params}, tokens, Context(**ctx))[0]

    apply = jax.jit(partial(model.apply, method="hidden"))
    zeros = hidden()
    np.testing.assert_array_equal(zeros, hidden(token_types_BT=jnp.zeros_like(TYPES)))
    assert (jnp.abs(zeros - hidden(token_types_BT=jnp.asarray(TYPES))).max((1, 2)) > 1e-2).all()
    later = jnp.broadcast_to(jnp.arange(24) + 3, (2, 24))
    assert (jnp.abs(zeros - hidden(positions_BT=later)).max((1, 2)) > 1e-2).all()


@pytest.mark.ledger("B47", "L18")
@pytest.mark.parametrize(
    "preset, shape, count",
    [("base", (12, 768, 12, 64), 109_482_240), ("large", (24, 1024, 16, 64), 335_141_888)],
)
def test_published_sizes(preset, shape, count):
    """Layers, features, heads and features of a head; the count is without heads."""
    model = bert(**FAMILY.presets[preset], heads=None)
    assert P.count(model) == count
    kernel = P.abstract(model)["stack"]["pattern"]["blocks_0"]["mixer"]["layer"]["q"]["kernel"]
    assert kernel.shape == shape
    config = transformers.BertConfig(**FAMILY.write_config(model))
    with torch.device("meta"):
        module = transformers.BertModel(config)
    assert sum(p.numel() for p in module.parameters()) == count


def test_masked_model_leaves_what_else_it_was_trained_with():
    """A directory that calls itself BertForMaskedLM may hold all that pretraining trained."""
    module = make_torch("BertForPreTraining")
    model = FAMILY.read_config(
        module.config.to_diff_dict() | {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    )
    tensors = hf.tensors_of(module)
    params = read_weights(FAMILY.weights(model), tensors, P.abstract(model), FAMILY.ignore)
    assert "pooler" not in params and "classifier" not in params


def test_other_classes_are_named():
    config = make_torch("BertModel").config.to_diff_dict() | {"model_type": "bert"}
    with pytest.raises(ValueError, match="BertLMHeadModel"):
        FAMILY.read_config(config | {"architectures": ["BertLMHeadModel"]})
    with pytest.raises(ValueError, match="position_embedding_type"):
        FAMILY.read_config(config | {"position_embedding_type": "relative_key"})


def test_encoder_without_a_head_says_so():
    model = FAMILY.build(**FAMILY.tiny, heads=None)
    params = P.abstract(model)
    with pytest.raises(ValueError, match="no head"):
        jax.eval_shape(lambda params: model.apply({"params": params}, hf.ids(61)), params)


@pytest.mark.ledger("B14")
@pytest.mark.slow
def test_two_tower_shares_the_api():
    """Two encoders, parameters of their own, read tokens and ctx.source as other models do."""
    module = make_torch("BertModel")
    tower, left = hf.import_torch(FAMILY, module)
    model = TwoTower(tower, tower)
    fresh = P.init(model, jax.random.key(0))
    assert P.count(model) == 2 * P.count(tower)
    right = fresh["right"]
    assert not np.array_equal(fresh["left"]["embed"]["table"], right["embed"]["table"])
    params = {"left": left, "right": right}
    tokens, mask = hf.ids(61), hf.right_padded()
    source = jnp.asarray(hf.ids(61, (2, 11), seed=1))
    ctx = Context(
        segments_BT=jnp.asarray(mask), source_BS=source, token_types_BT=jnp.asarray(TYPES)
    )

    @jax.jit
    def apply(params, tokens, ctx):
        similarities, state = model.apply({"params": params}, tokens, ctx)
        assert state is None
        return similarities

    pooled = run_torch(module, tokens, mask)[1].detach().numpy()
    other = jax.jit(partial(tower.apply, method="pooled"))({"params": right}, source)
    expected = np.asarray(
        [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in np.asarray(other)] for a in pooled]
    )
    similarities = apply(params, tokens, ctx)
    np.testing.assert_allclose(similarities, expected, atol=1e-5)
    padded = ctx.replace(
        source_BS=jnp.pad(source, ((0, 0), (0, 5)), constant_values=9),
        source_segments_BS=jnp.pad(jnp.ones_like(source), ((0, 0), (0, 5))),
    )
    np.testing.assert_allclose(apply(params, tokens, padded), similarities, atol=1e-6)
    moved = apply(params, tokens, ctx.replace(source_BS=source.at[:, 3:9].add(-1)))
    assert (jnp.abs(moved - similarities) > 1e-4).all()
    grads = jax.jit(jax.grad(lambda p: jnp.trace(apply(p, tokens, ctx))))(params)
    assert all(jnp.abs(grads[side]["embed"]["table"]).max() > 0 for side in params)
