"""The transformer of 2017 (Vaswani et al.): post-norm, with sinusoidal positions, as in Marian."""

import math

from lm.core.init import Normal, VarianceScaling
from lm.layers.attention import Attention, CrossAttention
from lm.layers.block import Block, PostNorm
from lm.layers.embed import Embed, Entry
from lm.layers.head import TiedHead
from lm.layers.mlp import MLP
from lm.layers.norm import LayerNorm
from lm.layers.position import SinusoidalPositions
from lm.models.encdec import EncoderDecoder
from lm.models.family import ActivationField, Family, Field
from lm.models.foreign import Same, Weight, attention, in_layers, layer_norm, projection
from lm.models.stack import Stack

XAVIER = VarianceScaling(1.0, "average", "uniform")


def vanilla(
    vocab_size: int = 37000,
    max_length: int = 1024,
    num_features: int = 512,
    num_heads: int = 8,
    num_layers: int = 6,
    mlp_features: int = 2048,
    decoder_heads: int | None = None,
    decoder_layers: int | None = None,
    decoder_mlp_features: int | None = None,
    activation: str = "relu",
    scaled: bool = True,
    dropout: float = 0.0,
    start_id: int = 0,
) -> EncoderDecoder:
    """Returns the model; `scaled` multiplies embeddings by sqrt(D), as the paper does."""

    def stack(heads, layers, hidden, *attentions):
        size = num_features // (heads or num_heads)
        mixer, *cross = (
            kind(heads or num_heads, size, qkv_bias=True, out_bias=True, kernel_init=XAVIER)
            for kind in (Attention, *attentions)
        )
        mlp = MLP(hidden or mlp_features, activation, kernel_init=XAVIER)
        block = Block(*(PostNorm(part, LayerNorm(), dropout) for part in (mixer, mlp, *cross)))
        entry = Entry(SinusoidalPositions(), dropout=dropout)
        return Stack((block,), layers or num_layers, entry=entry)

    scale = math.sqrt(num_features) if scaled else 1.0
    return EncoderDecoder(
        Embed(vocab_size, num_features, scale, table_init=Normal(1 / math.sqrt(num_features))),
        stack(num_heads, num_layers, mlp_features),
        stack(decoder_heads, decoder_layers, decoder_mlp_features, CrossAttention),
        TiedHead(bias=True),
        start_id=start_id,
        max_length=max_length,
    )


class StartField(Field):
    """Marian starts the decoder with its padding token, whose id must lie in the vocabulary."""

    def write(self, model: EncoderDecoder) -> dict:
        return super().write(model) | {"pad_token_id": model.start_id}


ENCODER, DECODER = (f"{side}.pattern.blocks.0" for side in ("encoder", "decoder"))
FIELDS = [
    Field("vocab_size", "vocab_size", "embed.vocab_size", 58101),
    Field("max_length", "max_position_embeddings", "max_length", 1024),
    Field("num_features", "d_model", "embed.features", 1024),
    Field("num_heads", "encoder_attention_heads", f"{ENCODER}.mixer.layer.num_heads", 16),
    Field("num_layers", "encoder_layers", "encoder.repeats", 12),
    Field("mlp_features", "encoder_ffn_dim", f"{ENCODER}.mlp.layer.hidden", 4096),
    Field("decoder_heads", "decoder_attention_heads", f"{DECODER}.mixer.layer.num_heads", 16),
    Field("decoder_layers", "decoder_layers", "decoder.repeats", 12),
    Field("decoder_mlp_features", "decoder_ffn_dim", f"{DECODER}.mlp.layer.hidden", 4096),
    ActivationField("activation", "activation_function", f"{DECODER}.mlp.layer.activation", "gelu"),
    Field("scaled", "scale_embedding", lambda model: model.embed.scale != 1.0, False),
    Field("dropout", "dropout", f"{DECODER}.mixer.dropout", 0.1),
    StartField("start_id", "decoder_start_token_id", "start_id", 58100),
]
ON = ("is_encoder_decoder", "share_encoder_decoder_embeddings", "tie_word_embeddings")
OFF = ("normalize_before", "normalize_embedding", "add_final_layer_norm", "add_bias_logits")


def side(name: str) -> list[Weight]:
    """Rows of one stack."""
    mixers = {"mixer": "self_attn", "cross": "encoder_attn"}
    rows = [*projection("mlp/layer/up", "fc1"), *projection("mlp/layer/down", "fc2")]
    rows += layer_norm("mlp/norm", "final_layer_norm")
    for ours, theirs in list(mixers.items())[: 1 if name == "encoder" else 2]:
        rows += attention(f"{ours}/layer", [f"{theirs}.{p}_proj" for p in ("q", "k", "v", "out")])
        rows += layer_norm(f"{ours}/norm", f"{theirs}_layer_norm")
    return in_layers(rows, f"{name}/pattern/blocks_0/", f"model.{name}.layers.{{}}.")


def weights(model: EncoderDecoder) -> list[Weight]:
    bias = Weight("head/bias", "final_logits_bias", Same(lambda shape: (1, *shape)))
    table = Weight("embed/table", "model.shared.weight")
    return [table, *side("encoder"), *side("decoder"), bias]


FAMILY = Family(
    name="vanilla",
    build=vanilla,
    presets={"base": {}, "big": dict(num_features=1024, num_heads=16, mlp_features=4096)},
    tiny=dict(vocab_size=61, num_features=32, num_heads=4, num_layers=3, mlp_features=48),
    ledger=("B14", "B21", "N02"),
    classes={"marian": "MarianMTModel"},
    fields=FIELDS,
    fixed=dict.fromkeys(ON, (True,)) | dict.fromkeys(OFF, (False,)),
    inert=(
        *("decoder_vocab_size", "encoder_layerdrop", "decoder_layerdrop", "init_std"),
        *("num_hidden_layers", "classif_dropout", "_num_labels", "extra_pos_embeddings"),
    ),
    weights=weights,
    ignore=(r"lm_head\.weight", r"model\.(encoder|decoder)\.embed_(tokens|positions)\.weight"),
)
