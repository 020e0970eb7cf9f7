"""teenyGPT: a post-norm character-level decoder of about a million weights."""

from lm.core.init import ZEROS, Normal, VarianceScaling
from lm.layers.attention import Attention
from lm.layers.block import Block, PostNorm
from lm.layers.embed import Embed, Entry
from lm.layers.head import Head
from lm.layers.mlp import MLP
from lm.layers.norm import LayerNorm
from lm.layers.position import LearnedPositions
from lm.models.decoder import Decoder
from lm.models.family import Family
from lm.models.stack import Stack
from lm.ops.rotary import Rotary

TORCH_LINEAR = VarianceScaling(1 / 3, "in", "uniform")
# Xavier over the packed (3 D, D) projection of q, k and v together, as torch draws it.
PACKED_XAVIER = VarianceScaling(0.5, "in", "uniform")


def teeny_gpt(
    vocab_size: int = 29,
    max_length: int = 150,
    num_features: int = 32,
    num_heads: int = 8,
    num_layers: int = 4,
    mlp_multiplier: int = 128,
    dropout: float = 0.0,
    rotary: Rotary | None = None,
) -> Decoder:
    """Returns the model; the defaults have exactly 1,089,181 parameters.

    Args:
      vocab_size: number of characters, padding and start included.
      max_length: number of positions.
      num_features: D.
      num_heads: N; each head has D / N features.
      num_layers: number of blocks.
      mlp_multiplier: the MLP is `mlp_multiplier * num_features` wide (4096 by default), as in the
        original, whose prose calls this number its "neurons".
      dropout: rate on the sum of embedding and position, the only place the original has it.
      rotary: rotates queries and keys in place of the learned positions, which the original has.
    """
    attention = Attention(
        num_heads,
        num_features // num_heads,
        rotary=rotary,
        qkv_bias=True,
        out_bias=True,
        kernel_init=PACKED_XAVIER,
        out_init=TORCH_LINEAR,
        bias_init=ZEROS,
    )
    mlp = MLP(mlp_multiplier * num_features, kernel_init=TORCH_LINEAR, bias_init=TORCH_LINEAR)
    positions = LearnedPositions(max_length, table_init=Normal(1.0)) if rotary is None else None
    return Decoder(
        Embed(vocab_size, num_features, table_init=Normal(1.0)),
        Stack(
            (Block(PostNorm(attention, LayerNorm()), PostNorm(mlp, LayerNorm())),),
            num_layers,
            entry=Entry(positions, dropout=dropout),
        ),
        Head(vocab_size, bias=True, kernel_init=TORCH_LINEAR, bias_init=TORCH_LINEAR),
        max_length=max_length,
    )


FAMILY = Family(
    name="teeny_gpt",
    build=teeny_gpt,
    presets={
        "post": {},
        "notebook": dict(mlp_multiplier=512),
        "prose": dict(mlp_multiplier=4),
    },
    tiny=dict(num_features=16, num_heads=4, num_layers=3, mlp_multiplier=4, max_length=64),
    ledger=("B65", "B66"),
    inapplicable={
        "export": "no Hugging Face class is a post-norm decoder with learned positions",
    },
)
