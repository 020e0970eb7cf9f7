"""GPT-2 equals GPT2LMHeadModel."""

import jax
import numpy as np
import pytest

from lm.core.context import Context
from lm.models import params as P
from lm.models.families.gpt2 import FAMILY, gpt2
from tests.conformance.harness import forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf  # noqa: E402


def make_torch(n_layer=3, **changes):
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=40, n_embd=32, n_head=4, n_layer=n_layer, **changes
    )
    return hf.randomize(transformers.GPT2LMHeadModel(config))


@pytest.mark.ledger("B51", "B22")
@pytest.mark.parametrize("changes", [{}, {"n_inner": 48, "layer_norm_epsilon": 1e-3}])
def test_equals_transformers(changes):
    hf.assert_causal_lm_parity(FAMILY, make_torch(**changes))


@pytest.mark.ledger("B51")
def test_published_counts():
    assert P.count(FAMILY.preset("small")) == 124_439_808
    assert P.count(FAMILY.preset("xl")) == 1_557_611_200


@pytest.mark.parametrize(
    "change, named",
    [
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"rope_theta": 5.0}, "rope_theta"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_unknown_config_is_named(change, named):
    config = make_torch().config.to_diff_dict() | {"model_type": "gpt2"} | change
    with pytest.raises(ValueError, match=named):
        FAMILY.read_config(config)


@pytest.mark.ledger("B52")
def test_gpt3_count():
    """96 layers of 96 heads of 128."""
    assert P.count(FAMILY.preset("gpt3-175b")) == 174_604_259_328


def alternating(params):
    """Returns the parameters of all layers as those of layers that alternate."""
    params = dict(params, stack=dict(params["stack"]))
    layers = params["stack"]["pattern"]["blocks_0"]
    params["stack"]["pattern"] = {
        "blocks_0": jax.tree.map(lambda leaf: leaf[::2], layers),
        "blocks_1": jax.tree.map(lambda leaf: leaf[1::2], layers),
    }
    return params


@pytest.mark.ledger("B52", "L28")
def test_bands_wider_than_the_row_are_dense():
    """The alternating model is then the dense one, and so Hugging Face's; else it is not."""
    module = make_torch(n_layer=4)
    _, params = hf.import_torch(FAMILY, module)
    tokens = hf.ids(61)
    with torch.no_grad():
        theirs = module(input_ids=torch.from_numpy(tokens).long()).logits.numpy()

    def difference(window):
        model = gpt2(61, 40, 32, 4, 4, window=window)
        ours, _ = forward(model, alternating(params), tokens, Context())
        return np.abs(np.asarray(ours) - theirs).max()

    assert difference(tokens.shape[1]) <= 1e-4
    assert difference(tokens.shape[1] - 1) > 1e-3


def test_bands_have_no_foreign_form():
    with pytest.raises(ValueError, match="not a gpt2 that a Hugging Face config can say"):
        FAMILY.write_config(gpt2(61, 40, 32, 4, 4, window=8))
    with pytest.raises(ValueError, match="an even number, not 3"):
        gpt2(61, 40, 32, 4, 3, window=8)
