"""GPT-2 equals GPT2LMHeadModel."""

import pytest

from lm.models import params as P
from lm.models.families.gpt2 import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf  # noqa: E402


def make_torch(**changes):
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=40, n_embd=32, n_head=4, n_layer=3, **changes
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
