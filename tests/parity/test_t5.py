"""T5 1.0 and 1.1 equal T5ForConditionalGeneration."""

import numpy as np
import pytest

from lm.models import params as P
from lm.models.families.t5 import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf, seq2seq  # noqa: E402

SIZES = dict(
    vocab_size=61,
    d_model=32,
    d_kv=6,
    d_ff=48,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
)


def make_torch(version: str):
    if version == "1.0":
        config = transformers.T5Config(**SIZES)
        return hf.randomize(transformers.T5ForConditionalGeneration(config))
    config = transformers.T5Config(
        **SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    module = transformers.T5ForConditionalGeneration(config)
    # Version 5 of transformers ties the head of a fresh model whatever the config says.
    module.lm_head.weight = torch.nn.Parameter(torch.randn(61, 32) / 6)
    module.config.tie_word_embeddings = False
    return hf.randomize(module)


@pytest.mark.ledger("B63")
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_equals_transformers(version):
    module = make_torch(version)
    _, params = seq2seq.assert_parity(FAMILY, module)
    hf.assert_counts(module, params)
    assert ("kernel" in params.get("head", {})) == (version == "1.1")


@pytest.mark.slow
@pytest.mark.ledger("B14")
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_decoder_reads_the_source(version):
    seq2seq.assert_conditional(*hf.import_torch(FAMILY, make_torch(version)))


@pytest.mark.ledger("B63")
@pytest.mark.parametrize(
    "preset, count",
    [
        ("small", 60_506_624),
        ("base", 222_903_552),
        ("large", 737_668_096),
        ("3b", 2_851_598_336),
        ("11b", 11_307_321_344),
    ],
)
def test_published_counts(preset, count):
    assert P.count(FAMILY.preset(preset)) == count


def test_tied_in_the_words_of_both_major_versions():
    """Version 4 says of 1.1 that it is not tied; 5 says it is, and that outputs are not scaled."""
    old = dict(SIZES, model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    new = old | dict(tie_word_embeddings=True, scale_decoder_outputs=False)
    assert FAMILY.read_config(old) == FAMILY.read_config(new)
    written = FAMILY.write_config(FAMILY.read_config(new))
    assert written["tie_word_embeddings"] is False and "scale_decoder_outputs" not in written
    assert transformers.T5Config(**written).scale_decoder_outputs is False


def test_other_feed_forward_is_named():
    with pytest.raises(ValueError, match=r"feed_forward_proj.*gated-tanh"):
        FAMILY.read_config(dict(SIZES, model_type="t5", feed_forward_proj="gated-tanh"))


def test_initial_scores_are_of_order_one():
    """The missing 1 / sqrt(H) is in the initial queries."""
    import jax

    params = P.init(FAMILY.build(num_features=256, head_dim=64, num_layers=1), jax.random.key(0))
    mixer = params["encoder"]["pattern"]["blocks_0"]["mixer"]["layer"]
    assert abs(np.std(mixer["q"]["kernel"]) * np.sqrt(256 * 64) - 1) < 0.05
    assert abs(np.std(mixer["k"]["kernel"]) * np.sqrt(256) - 1) < 0.05
