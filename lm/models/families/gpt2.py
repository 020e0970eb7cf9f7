"""GPT-2 (Radford et al., 2019) and larger: pre-norm, learned positions and a tied head."""

import math

from lm.core.init import Normal
from lm.layers.attention import Attention
from lm.layers.block import Block, PreNorm
from lm.layers.embed import Embed, Entry
from lm.layers.head import TiedHead
from lm.layers.mlp import MLP
from lm.layers.norm import LayerNorm
from lm.layers.position import LearnedPositions
from lm.models.decoder import Decoder
from lm.models.family import Family, Field
from lm.models.foreign import Linear, Vector, Weight, in_layers, layer_norm
from lm.models.stack import Stack
from lm.models.tasks import DECODER_TASKS, classifier_rows


def gpt2(
    vocab_size: int = 50257, max_length: int = 1024, num_features: int = 768, num_heads: int = 12,
    num_layers: int = 12, mlp_features: int | None = None, eps: float = 1e-5, dropout: float = 0.0,
    window: int | None = None,
) -> Decoder:  # fmt: skip
    """Returns the model; kernels into the residual stream start smaller by sqrt(2 * layers).

    With a `window` every second layer sees only that many places, as in GPT-3 (Brown et al., 2020).
    """
    bands = (None,) if window is None else (None, window)
    if num_layers % len(bands):
        raise ValueError(f"layers that alternate are an even number, not {num_layers}")
    init, out_init = Normal(), Normal(0.02 / math.sqrt(2 * num_layers))
    heads = dict(head_dim=num_features // num_heads, kernel_init=init, out_init=out_init)
    mlp = MLP(mlp_features or 4 * num_features, "gelu_tanh", kernel_init=init, down_init=out_init)
    norm = LayerNorm(eps)

    def block(band: int | None) -> Block:
        attention = Attention(num_heads, window=band, qkv_bias=True, out_bias=True, **heads)
        return Block(PreNorm(attention, norm, dropout), PreNorm(mlp, norm, dropout))

    return Decoder(
        Embed(vocab_size, num_features, table_init=Normal()),
        Stack(
            tuple(map(block, bands)),
            num_layers // len(bands),
            entry=Entry(LearnedPositions(max_length, table_init=Normal()), dropout=dropout),
            norm=norm,
        ),
        TiedHead(),
        max_length=max_length,
    )


BLOCK = "stack.pattern.blocks.0"
FIELDS = [
    Field("vocab_size", "vocab_size", "embed.vocab_size", 50257),
    Field("max_length", "n_positions", "max_length", 1024),
    Field("num_features", "n_embd", "embed.features", 768),
    Field("num_heads", "n_head", f"{BLOCK}.mixer.layer.num_heads", 12),
    Field("num_layers", "n_layer", "stack.repeats", 12),
    Field("mlp_features", "n_inner", f"{BLOCK}.mlp.layer.hidden", None),
    Field("eps", "layer_norm_epsilon", "stack.norm.eps", 1e-5),
    Field("dropout", "resid_pdrop", f"{BLOCK}.mixer.dropout", 0.1),
]
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # It changes nothing but rounding.
    "tie_word_embeddings": (True,),
}
CONV1D = Linear(transposed=False)
ROWS = [
    *layer_norm("mixer/norm", "ln_1"),
    Weight(tuple(f"mixer/layer/{p}/kernel" for p in "qkv"), "attn.c_attn.weight", CONV1D),
    Weight(tuple(f"mixer/layer/{p}/bias" for p in "qkv"), "attn.c_attn.bias", Vector()),
    Weight("mixer/layer/out/kernel", "attn.c_proj.weight", Linear(2, transposed=False)),
    Weight("mixer/layer/out/bias", "attn.c_proj.bias"),
    *layer_norm("mlp/norm", "ln_2"),
    Weight("mlp/layer/up/kernel", "mlp.c_fc.weight", CONV1D),
    Weight("mlp/layer/up/bias", "mlp.c_fc.bias"),
    Weight("mlp/layer/down/kernel", "mlp.c_proj.weight", CONV1D),
    Weight("mlp/layer/down/bias", "mlp.c_proj.bias"),
]


def weights(model: Decoder) -> list[Weight]:
    return [
        Weight("embed/table", "transformer.wte.weight"),
        Weight("stack/entry/positions/table", "transformer.wpe.weight"),
        *in_layers(ROWS, "stack/pattern/blocks_0/", "transformer.h.{}."),
        *layer_norm("stack/norm", "transformer.ln_f"),
        *classifier_rows(model, dict(sequence="score", token="classifier", span="qa_outputs")),
    ]


GPT3 = dict(max_length=2048, window=256)  # The paper does not say how wide its bands are.
FAMILY = Family(
    name="gpt2",
    build=gpt2,
    presets={
        "small": {},
        "medium": dict(num_features=1024, num_heads=16, num_layers=24),
        "large": dict(num_features=1280, num_heads=20, num_layers=36),
        "xl": dict(num_features=1600, num_heads=25, num_layers=48),
        "megatron-8.3b": dict(num_features=3072, num_heads=24, num_layers=72),
        "gpt3-small": GPT3,
        "gpt3-6.7b": dict(**GPT3, num_features=4096, num_heads=32, num_layers=32),
        "gpt3-175b": dict(**GPT3, num_features=12288, num_heads=96, num_layers=96),
        "mt-nlg-530b": dict(max_length=2048, num_features=20480, num_heads=128, num_layers=105),
    },
    tiny=dict(vocab_size=61, max_length=64, num_features=32, num_heads=4, num_layers=3),
    ledger=("B22", "B51", "B52", "L28", "N53"),
    classes={"gpt2": "GPT2LMHeadModel"},
    heads={"LMHeadModel": {}, **DECODER_TASKS},
    fields=FIELDS,
    fixed=FIXED,
    weights=weights,
    ignore=(r"lm_head\.weight", r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
)
