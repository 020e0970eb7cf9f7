"""Llama (Touvron et al., 2023) and Mistral (Jiang et al., 2023): one composition, by presets."""

from lm.core.init import Normal
from lm.layers.attention import Attention
from lm.layers.block import Block, PreNorm
from lm.layers.embed import Embed
from lm.layers.head import Head, TiedHead
from lm.layers.mlp import GLU
from lm.layers.norm import RMSNorm
from lm.models.decoder import Decoder
from lm.models.family import Family, Field, RotaryField, look_up
from lm.models.foreign import Linear, Weight, in_layers, projection
from lm.models.stack import Stack
from lm.models.tasks import DECODER_TASKS, classifier_rows, task_of
from lm.ops.rotary import Llama3Scaling, Rotary


def llama(
    vocab_size: int = 32000,
    max_length: int | None = 4096,
    num_features: int = 4096,
    num_heads: int = 32,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    num_layers: int = 32,
    mlp_features: int = 11008,
    rotary: Rotary = Rotary(),
    window: int | None = None,
    tied: bool = False,
    eps: float = 1e-5,
) -> Decoder:
    """Returns the model: RMSNorm, rotary positions, grouped-query attention and SwiGLU."""
    attention = Attention(
        num_heads,
        head_dim or num_features // num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        rotary=rotary,
        window=window,
        kernel_init=Normal(),
    )
    norm = RMSNorm(eps)
    block = Block(PreNorm(attention, norm), PreNorm(GLU(mlp_features, kernel_init=Normal()), norm))
    return Decoder(
        Embed(vocab_size, num_features, table_init=Normal()),
        Stack((block,), num_layers, norm=norm),
        TiedHead() if tied else Head(vocab_size, kernel_init=Normal()),
        max_length=max_length,
    )


BLOCK = "stack.pattern.blocks.0"
FIELDS = [
    Field("vocab_size", "vocab_size", "embed.vocab_size"),
    Field("max_length", "max_position_embeddings", "max_length", 4096),
    Field("num_features", "hidden_size", "embed.features"),
    Field("num_heads", "num_attention_heads", f"{BLOCK}.mixer.layer.num_heads"),
    Field("num_kv_heads", "num_key_value_heads", f"{BLOCK}.mixer.layer.num_kv_heads", None),
    Field("head_dim", "head_dim", f"{BLOCK}.mixer.layer.head_dim", None),
    Field("num_layers", "num_hidden_layers", "stack.repeats"),
    Field("mlp_features", "intermediate_size", f"{BLOCK}.mlp.layer.hidden"),
    Field("window", "sliding_window", f"{BLOCK}.mixer.layer.window", None),
    Field("tied", "tie_word_embeddings", lambda model: isinstance(model.head, TiedHead), False),
    Field("eps", "rms_norm_eps", "stack.norm.eps", 1e-6),
    RotaryField("rotary", where=f"{BLOCK}.mixer.layer.rotary"),
]
FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
ROWS = [
    Weight("mixer/norm/scale", "input_layernorm.weight"),
    *(Weight(f"mixer/layer/{p}/kernel", f"self_attn.{p}_proj.weight", Linear()) for p in "qkv"),
    Weight("mixer/layer/out/kernel", "self_attn.o_proj.weight", Linear(2)),
    Weight("mlp/norm/scale", "post_attention_layernorm.weight"),
    *(projection(f"mlp/layer/{p}", f"mlp.{p}_proj", bias=False)[0] for p in ("gate", "up", "down")),
]


def weights(model: Decoder) -> list[Weight]:
    # LlamaForQuestionAnswering alone calls its body otherwise; Mistral's class does not.
    odd = task_of(model) == "span" and model_type(model) == "llama"
    body = "transformer" if odd else "model"
    return [
        Weight("embed/table", f"{body}.embed_tokens.weight"),
        *in_layers(ROWS, "stack/pattern/blocks_0/", f"{body}.layers.{{}}."),
        Weight("stack/norm/scale", f"{body}.norm.weight"),
        *(projection("head", "lm_head", bias=False) if isinstance(model.head, Head) else []),
        *classifier_rows(model, dict(sequence="score", token="score", span="qa_outputs")),
    ]


def model_type(model: Decoder) -> str:
    return "llama" if look_up(model, f"{BLOCK}.mixer.layer.window") is None else "mistral"


LLAMA3 = dict(vocab_size=128256, num_kv_heads=8, max_length=8192, rotary=Rotary(theta=500000.0))
LARGE = dict(num_features=8192, num_heads=64, num_layers=80, mlp_features=28672)
FAMILY = Family(
    name="llama",
    build=llama,
    presets={
        "llama1-7b": dict(max_length=2048, eps=1e-6),
        "llama2-7b": {},
        "llama2-70b": dict(**LARGE, num_kv_heads=8),
        "llama3-8b": dict(**LLAMA3, mlp_features=14336),
        "llama3-70b": dict(**LLAMA3, **LARGE),
        "llama3.1-8b": LLAMA3
        | dict(max_length=131072, rotary=Rotary(500000.0, Llama3Scaling()), mlp_features=14336),
        "mistral-7b": dict(num_kv_heads=8, mlp_features=14336, max_length=32768, window=4096),
    },
    tiny=dict(
        vocab_size=61, max_length=64, num_features=32, num_heads=4, num_kv_heads=2, num_layers=3,
        mlp_features=48, rotary=Rotary(500.0, Llama3Scaling(original_length=16)),
    ),
    ledger=("B54", "B55", "B57", "N07", "L36"),
    classes={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    heads={"ForCausalLM": {}, **DECODER_TASKS},
    write_type=model_type,
    fields=FIELDS,
    fixed=FIXED,
    weights=weights,
    ignore=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)  # fmt: skip
