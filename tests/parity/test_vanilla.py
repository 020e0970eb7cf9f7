"""The transformer of 2017 equals MarianMTModel."""

import pytest

from lm.models import params as P
from lm.models.families.vanilla import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf, seq2seq  # noqa: E402

SIZES = dict(
    vocab_size=61,
    d_model=32,
    encoder_layers=3,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=40,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
    forced_eos_token_id=1,
    scale_embedding=True,
    activation_function="relu",
)
UNEVEN = dict(
    decoder_layers=2,
    decoder_attention_heads=8,
    decoder_ffn_dim=40,
    scale_embedding=False,
    activation_function="swish",
)


def make_torch(**changes):
    module = transformers.MarianMTModel(transformers.MarianConfig(**{**SIZES, **changes}))
    # The bias is a buffer there and trained here.
    bias = module.final_logits_bias
    del module._buffers["final_logits_bias"]
    module.register_parameter("final_logits_bias", torch.nn.Parameter(bias.detach().clone()))
    hf.randomize(module)
    with torch.no_grad():  # Positions are formally parameters, and no noise may move them.
        for side in (module.model.encoder, module.model.decoder):
            side.embed_positions.weight.copy_(side.embed_positions.create_weight())
    return module


@pytest.mark.ledger("B21", "N02")
@pytest.mark.parametrize("changes", [{}, UNEVEN], ids=["paper", "uneven"])
@pytest.mark.slow
def test_equals_transformers(changes):
    module = make_torch(**changes)
    _, params = seq2seq.assert_parity(FAMILY, module)
    positions = module.model.encoder.embed_positions.weight.numel()
    assert P.count(params) == sum(p.numel() for p in module.parameters()) - 2 * positions


@pytest.mark.ledger("B14")
@pytest.mark.slow
def test_decoder_reads_the_source():
    seq2seq.assert_conditional(*hf.import_torch(FAMILY, make_torch()))


def test_sizes_of_the_paper():
    """Table 3 has 65 and 213 million, with a vocabulary of about 37,000."""
    assert P.count(FAMILY.preset("base")) == 63_119_496
    assert P.count(FAMILY.preset("big")) == 214_282_376


def test_published_config_is_read():
    """The keys that the directories of Helsinki-NLP/opus-mt-* have."""
    config = dict(
        _num_labels=3, activation_dropout=0.0, activation_function="swish", add_bias_logits=False,
        add_final_layer_norm=False, architectures=["MarianMTModel"], attention_dropout=0.0,
        bad_words_ids=[[58100]], bos_token_id=0, classif_dropout=0.0, classifier_dropout=0.0,
        d_model=512, decoder_attention_heads=8, decoder_ffn_dim=2048, decoder_layerdrop=0.0,
        decoder_layers=6, decoder_start_token_id=58100, decoder_vocab_size=58101, dropout=0.1,
        encoder_attention_heads=8, encoder_ffn_dim=2048, encoder_layerdrop=0.0, encoder_layers=6,
        eos_token_id=0, extra_pos_embeddings=58101, forced_eos_token_id=0, init_std=0.02,
        id2label={}, label2id={}, is_encoder_decoder=True, max_length=512,
        max_position_embeddings=512, model_type="marian", normalize_before=False,
        normalize_embedding=False, num_beams=6, num_hidden_layers=6, pad_token_id=58100,
        scale_embedding=True, share_encoder_decoder_embeddings=True,
        static_position_embeddings=True, transformers_version="4.22.0.dev0", use_cache=True,
        vocab_size=58101,
    )  # fmt: skip
    model = FAMILY.read_config(config)
    assert model.start_id == 58100 and model.max_length == 512 and model.decoder.repeats == 6
    with pytest.raises(ValueError, match="normalize_before"):
        FAMILY.read_config(config | {"normalize_before": True})


def test_written_config_makes_their_class():
    written = FAMILY.write_config(FAMILY.build(**FAMILY.tiny))
    module = transformers.MarianMTModel(transformers.MarianConfig(**written))
    assert module.config.pad_token_id == FAMILY.build(**FAMILY.tiny).start_id
