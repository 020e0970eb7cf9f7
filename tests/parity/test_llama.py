"""Llama and Mistral equal their Hugging Face classes."""

import pytest

from lm.models import params as P
from lm.models.families.llama import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf  # noqa: E402

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.ledger("N07"), id="mha"),
        pytest.param({"num_key_value_heads": 2}, marks=pytest.mark.ledger("B54"), id="gqa"),
        pytest.param({"num_key_value_heads": 1, "tie_word_embeddings": True}, id="mqa-tied"),
        pytest.param({"num_key_value_heads": 2, "head_dim": 16}, id="wide-heads"),
        pytest.param(
            {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
            marks=pytest.mark.ledger("B55"),
            id="llama3-rope",
        ),
    ],
)
def test_llama_equals_transformers(changes):
    config = transformers.LlamaConfig(**SIZES, **changes)
    hf.assert_causal_lm_parity(FAMILY, hf.randomize(transformers.LlamaForCausalLM(config)))


@pytest.mark.ledger("B57")
def test_mistral_equals_transformers():
    config = transformers.MistralConfig(
        **SIZES, num_key_value_heads=2, sliding_window=6, attn_implementation="eager"
    )
    module = hf.randomize(transformers.MistralForCausalLM(config))
    hf.assert_causal_lm_parity(FAMILY, module)


@pytest.mark.parametrize(
    "preset, count",
    [
        pytest.param("llama2-7b", 6_738_415_616, marks=pytest.mark.ledger("B54")),
        pytest.param("llama2-70b", 68_976_648_192, marks=pytest.mark.ledger("B54")),
        pytest.param("llama3-8b", 8_030_261_248, marks=pytest.mark.ledger("B55")),
        pytest.param("llama3-70b", 70_553_706_496, marks=pytest.mark.ledger("B55")),
        pytest.param("mistral-7b", 7_241_732_096, marks=pytest.mark.ledger("B57")),
    ],
)
def test_published_counts(preset, count):
    assert P.count(FAMILY.preset(preset)) == count


def test_old_and_new_rope_spellings_agree():
    new = transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3).to_diff_dict()
    new |= {"model_type": "llama"}
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert FAMILY.read_config(old) == FAMILY.read_config(new)
    with pytest.raises(ValueError, match="yarn"):
        FAMILY.read_config(old | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
