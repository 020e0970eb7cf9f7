"""T5 (Raffel et al., 2020), 1.0 and 1.1: an encoder-decoder with relative position biases."""

import math

from lm.core.init import Normal, VarianceScaling
from lm.layers.attention import Attention, CrossAttention
from lm.layers.block import Block, PreNorm
from lm.layers.embed import Embed, Entry
from lm.layers.head import Head, TiedHead
from lm.layers.mlp import GLU, MLP
from lm.layers.norm import RMSNorm
from lm.layers.position import RelativeBias
from lm.models.encdec import EncoderDecoder
from lm.models.family import Family, Field, ForeignConfig, look_up
from lm.models.foreign import Weight, attention, in_layers, projection
from lm.models.stack import Stack
from lm.models.tasks import DECODER_TASKS, classifier_rows, task_of


def t5(
    vocab_size: int = 32128, num_features: int = 512, num_heads: int = 8, num_layers: int = 6,
    mlp_features: int = 2048, head_dim: int = 64, num_decoder_layers: int | None = None,
    activation: str = "relu", tied: bool = True, num_buckets: int = 32, max_distance: int = 128,
    eps: float = 1e-6, dropout: float = 0.0, start_id: int = 0,
) -> EncoderDecoder:  # fmt: skip
    """Returns the model; 1.1 has a head of its own and, with any `activation` but relu, a GLU."""
    # Scores are not divided by sqrt(H): the initial queries are that much smaller instead.
    heads = dict(scale=1.0, q_init=VarianceScaling(1 / head_dim))
    mlp = (MLP if activation == "relu" else GLU)(mlp_features, activation, bias=False)
    norm, small = RMSNorm(eps), Normal(1 / math.sqrt(num_features))

    def stack(layers, bidirectional, *attentions):
        mixer, *cross = (kind(num_heads, head_dim, **heads) for kind in attentions)
        block = Block(*(PreNorm(part, norm, dropout) for part in (mixer, mlp, *cross)))
        bias = RelativeBias(num_heads, num_buckets, max_distance, bidirectional, small)
        return Stack((block,), layers, entry=Entry(dropout=dropout), norm=norm, bias=bias)

    return EncoderDecoder(
        Embed(vocab_size, num_features, table_init=Normal(1.0)),
        stack(num_layers, True, Attention),
        stack(num_decoder_layers or num_layers, False, Attention, CrossAttention),
        TiedHead(1 / math.sqrt(num_features)) if tied else Head(vocab_size),
        start_id=start_id,
    )


class TiedField(Field):
    """Transformers 5 always calls T5 tied, and says by another key whether it really is."""

    def read(self, config: ForeignConfig) -> bool:
        return config.take("scale_decoder_outputs", config.take(self.key, self.default))


BLOCK = "encoder.pattern.blocks.0"
ACTIVATION = f"{BLOCK}.mlp.layer.activation"
FEED_FORWARDS = {"relu": "relu", "gated-gelu": "gelu_tanh", "gated-silu": "silu"}
FIELDS = [
    Field("vocab_size", "vocab_size", "embed.vocab_size", 32128),
    Field("num_features", "d_model", "embed.features", 512),
    Field("num_heads", "num_heads", f"{BLOCK}.mixer.layer.num_heads", 8),
    Field("head_dim", "d_kv", f"{BLOCK}.mixer.layer.head_dim", 64),
    Field("num_layers", "num_layers", "encoder.repeats", 6),
    Field(
        "num_decoder_layers", "num_decoder_layers", lambda m: m.decoder and m.decoder.repeats, None
    ),
    Field("mlp_features", "d_ff", f"{BLOCK}.mlp.layer.hidden", 2048),
    Field("activation", "feed_forward_proj", ACTIVATION, "relu", FEED_FORWARDS),
    TiedField("tied", "tie_word_embeddings", lambda model: isinstance(model.head, TiedHead), True),
    Field("num_buckets", "relative_attention_num_buckets", "encoder.bias.num_buckets", 32),
    Field("max_distance", "relative_attention_max_distance", "encoder.bias.max_distance", 128),
    Field("eps", "layer_norm_epsilon", "encoder.norm.eps", 1e-6),
    Field("dropout", "dropout_rate", f"{BLOCK}.mixer.dropout", 0.1),
    Field("start_id", "decoder_start_token_id", "start_id", 0),
]
CLASSIFIERS = dict(sequence="classification_head.out_proj", token="classifier", span="qa_outputs")
MIXERS = {"mixer": "SelfAttention", "cross": "EncDecAttention"}


def weights(model: EncoderDecoder) -> list[Weight]:
    up = {"up": "wi"} if look_up(model, ACTIVATION) == "relu" else {"gate": "wi_0", "up": "wi_1"}
    body = "transformer." if task_of(model) in ("sequence", "token") else ""
    rows = [Weight("embed/table", f"{body}shared.weight"), *classifier_rows(model, CLASSIFIERS)]
    for side, last in [("encoder", 1), ("decoder", 2)][: 1 if model.decoder is None else 2]:
        block = [Weight("mlp/norm/scale", f"{last}.layer_norm.weight")]
        for index, (ours, theirs) in enumerate([*MIXERS.items()][:last]):
            names = [f"{index}.{theirs}.{p}" for p in "qkvo"]
            block += attention(f"{ours}/layer", names, bias=False)
            block.append(Weight(f"{ours}/norm/scale", f"{index}.layer_norm.weight"))
        for ours, theirs in {**up, "down": "wo"}.items():
            block += projection(f"mlp/layer/{ours}", f"{last}.DenseReluDense.{theirs}", bias=False)
        rows += in_layers(block, f"{side}/pattern/blocks_0/", f"{body}{side}.block.{{}}.layer.")
        first = f"{body}{side}.block.0.layer.0.SelfAttention"
        rows.append(Weight(f"{side}/bias/table", f"{first}.relative_attention_bias.weight"))
        rows.append(Weight(f"{side}/norm/scale", f"{body}{side}.final_layer_norm.weight"))
    pooler = projection("pooler/dense", "classification_head.dense") if model.pooler else []
    return rows + pooler + projection("head", "lm_head", bias=False) * isinstance(model.head, Head)


def sizes(*numbers: int, **others) -> dict:
    names = ("num_features", "num_heads", "num_layers", "mlp_features", "head_dim")
    return dict(zip(names, numbers), **others)


V1_1 = dict(activation="gelu_tanh", tied=False)
FAMILY = Family(
    name="t5", build=t5, ledger=("B14", "B63"), fields=FIELDS, weights=weights,
    presets={
        "small": sizes(512, 8, 6, 2048), "base": sizes(768, 12, 12, 3072),
        "large": sizes(1024, 16, 24, 4096), "3b": sizes(1024, 32, 24, 16384, 128),
        "11b": sizes(1024, 128, 24, 65536, 128),
        "1.1-small": sizes(512, 6, 8, 1024, **V1_1), "1.1-base": sizes(768, 12, 12, 2048, **V1_1),
        "1.1-large": sizes(1024, 16, 24, 2816, **V1_1), "1.1-xl": sizes(2048, 32, 24, 5120, **V1_1),
        "1.1-xxl": sizes(4096, 64, 24, 10240, **V1_1),
    },
    tiny=sizes(32, 4, 3, 48, 8, vocab_size=61, num_buckets=8, max_distance=10),
    classes={"t5": "T5ForConditionalGeneration"}, fixed={"is_encoder_decoder": (True, False)},
    heads={"ForConditionalGeneration": {}, "WithLMHeadModel": {}, **DECODER_TASKS},
    inert=("n_positions", "output_past", "dense_act_fn", "is_gated_act"),
    ignore=(r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight", r"lm_head\.weight"),
)  # fmt: skip
