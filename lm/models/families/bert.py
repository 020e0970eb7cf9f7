"""BERT (Devlin et al., 2019): a post-norm encoder with token types."""

from lm.core.init import Normal
from lm.layers.attention import Attention
from lm.layers.block import Block, PostNorm
from lm.layers.embed import Embed, Entry
from lm.layers.head import MaskedHead
from lm.layers.mlp import MLP
from lm.layers.norm import LayerNorm
from lm.layers.pool import Dense, FirstToken
from lm.layers.position import LearnedPositions
from lm.layers.projection import Projection
from lm.models.encoder import Encoder
from lm.models.family import ActivationField, Family, Field
from lm.models.foreign import Weight, attention, in_layers, layer_norm, projection
from lm.models.stack import Stack
from lm.models.tasks import TASKS, classifier_rows

HEADS = {"ForPreTraining": "pretraining", "ForMaskedLM": "masked", "Model": None}
CLASSIFIERS = dict.fromkeys(TASKS.values(), "classifier") | {"span": "qa_outputs"}


def bert(
    vocab_size: int = 30522,
    max_length: int = 512,
    num_features: int = 768,
    num_heads: int = 12,
    num_layers: int = 12,
    mlp_features: int = 3072,
    num_token_types: int = 2,
    activation: str = "gelu",
    eps: float = 1e-12,
    dropout: float = 0.0,
    heads: str | None = "pretraining",
) -> Encoder:
    """Returns the encoder; `heads` is 'pretraining', 'masked' (no pooler) or None (only that)."""
    if heads not in HEADS.values():
        raise ValueError(f"heads is 'pretraining', 'masked' or None, not {heads!r}")
    norm = LayerNorm(eps)
    mixer = Attention(
        num_heads, num_features // num_heads, qkv_bias=True, out_bias=True, kernel_init=Normal()
    )
    mlp = MLP(mlp_features, activation, kernel_init=Normal())
    block = Block(PostNorm(mixer, norm, dropout), PostNorm(mlp, norm, dropout))
    positions = LearnedPositions(max_length, table_init=Normal())
    next_sentence = Projection((2,), ("embed", "classes"), bias=True, kernel_init=Normal())
    return Encoder(
        Embed(vocab_size, num_features, table_init=Normal()),
        Stack((block,), num_layers, entry=Entry(positions, num_token_types, norm, dropout)),
        MaskedHead(norm, activation, kernel_init=Normal()) if heads else None,
        max_length=max_length,
        pooler=None if heads == "masked" else Dense(FirstToken(), kernel_init=Normal()),
        classifier=next_sentence if heads == "pretraining" else None,
    )


BLOCK = "stack.pattern.blocks.0"
FIELDS = [
    Field("vocab_size", "vocab_size", "embed.vocab_size", 30522),
    Field("max_length", "max_position_embeddings", "max_length", 512),
    Field("num_features", "hidden_size", "embed.features", 768),
    Field("num_heads", "num_attention_heads", f"{BLOCK}.mixer.layer.num_heads", 12),
    Field("num_layers", "num_hidden_layers", "stack.repeats", 12),
    Field("mlp_features", "intermediate_size", f"{BLOCK}.mlp.layer.hidden", 3072),
    Field("num_token_types", "type_vocab_size", "stack.entry.num_token_types", 2),
    ActivationField("activation", "hidden_act", f"{BLOCK}.mlp.layer.activation", "gelu"),
    Field("eps", "layer_norm_eps", "stack.entry.norm.eps", 1e-12),
    Field("dropout", "hidden_dropout_prob", f"{BLOCK}.mixer.dropout", 0.1),
]
NAMES = ("self.query", "self.key", "self.value", "output.dense")
ROWS = [
    *attention("mixer/layer", [f"attention.{name}" for name in NAMES]),
    *layer_norm("mixer/norm", "attention.output.LayerNorm"),
    *projection("mlp/layer/up", "intermediate.dense"),
    *projection("mlp/layer/down", "output.dense"),
    *layer_norm("mlp/norm", "output.LayerNorm"),
]


def weights(model: Encoder) -> list[Weight]:
    body = "" if model.head is None and model.classifier is None else "bert."
    words = f"{body}embeddings."
    rows = [
        Weight("embed/table", f"{words}word_embeddings.weight"),
        Weight("stack/entry/positions/table", f"{words}position_embeddings.weight"),
        Weight("stack/entry/token_types", f"{words}token_type_embeddings.weight"),
        *layer_norm("stack/entry/norm", f"{words}LayerNorm"),
        *in_layers(ROWS, "stack/pattern/blocks_0/", f"{body}encoder.layer.{{}}."),
    ]
    if model.head is not None:
        rows += projection("head/dense", "cls.predictions.transform.dense")
        rows += layer_norm("head/norm", "cls.predictions.transform.LayerNorm")
        rows += [Weight("head/bias", "cls.predictions.bias")]
        if model.classifier is not None:
            rows += projection("classifier", "cls.seq_relationship")
    if model.pooler is not None:
        rows += projection("pooler/dense", f"{body}pooler.dense")
    return rows + classifier_rows(model, CLASSIFIERS)


LARGE = dict(num_features=1024, num_heads=16, num_layers=24, mlp_features=4096)
FAMILY = Family(
    name="bert",
    build=bert,
    presets={"base": {}, "large": LARGE},
    tiny=dict(vocab_size=61, num_features=32, num_heads=4, num_layers=3, mlp_features=48),
    ledger=("B12", "B47", "L16", "L18"),
    classes={"bert": "BertForPreTraining"},
    heads={name: dict(heads=heads) for name, heads in HEADS.items()} | TASKS,
    fields=FIELDS,
    fixed={"position_embedding_type": ("absolute",), "tie_word_embeddings": (True,)},
    weights=weights,
    # A masked-language model's file may hold the pooler and classifier that it was trained with.
    ignore=(
        r"(bert\.)?(embeddings\.position_ids|pooler\..*)",
        r"cls\.(predictions\.decoder|seq_relationship)\..*",
    ),
    inapplicable={"causal": "it is bidirectional", "decode": "it keeps no decoding state"},
)
