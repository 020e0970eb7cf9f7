"""Mamba (Gu and Dao, 2023): a decoder of selective state-space mixers, without attention."""

import math

from lm.core.init import Normal, VarianceScaling
from lm.layers.block import Block, PreNorm
from lm.layers.embed import Embed
from lm.layers.head import Head, TiedHead
from lm.layers.mamba import Mamba
from lm.layers.norm import RMSNorm
from lm.models.decoder import Decoder
from lm.models.family import Family, Field, look_up
from lm.models.foreign import Linear, Same, Vector, Weight, in_layers, projection
from lm.models.stack import Stack


def mamba(
    vocab_size: int = 50280,
    num_features: int = 768,
    num_layers: int = 24,
    state_size: int = 16,
    expand: int = 2,
    conv_width: int = 4,
    dt_rank: int | str = "auto",
    bias: bool = False,
    conv_bias: bool = True,
    tied: bool = True,
    eps: float = 1e-5,
) -> Decoder:
    """Returns the model; `dt_rank` 'auto' is a sixteenth of the features, rounded up."""
    mixer = Mamba(
        expand * num_features,
        state_size,
        conv_width,
        math.ceil(num_features / 16) if dt_rank == "auto" else int(dt_rank),
        bias=bias,
        conv_bias=conv_bias,
        out_init=VarianceScaling(1 / 3 / num_layers, "in", "uniform"),
    )
    return Decoder(
        Embed(vocab_size, num_features, table_init=Normal()),
        Stack((Block(PreNorm(mixer, RMSNorm(eps))),), num_layers, norm=RMSNorm(eps)),
        TiedHead() if tied else Head(vocab_size, kernel_init=Normal()),
    )


MIXER = "stack.pattern.blocks.0.mixer.layer"
FIELDS = [
    Field("vocab_size", "vocab_size", "embed.vocab_size", 50280),
    Field("num_features", "hidden_size", "embed.features", 768),
    Field("num_layers", "num_hidden_layers", "stack.repeats", 32),
    Field("state_size", "state_size", f"{MIXER}.state_size", 16),
    Field("expand", "expand", lambda m: look_up(m, f"{MIXER}.inner") // m.embed.features, 2),
    Field("conv_width", "conv_kernel", f"{MIXER}.conv_width", 4),
    Field("dt_rank", "time_step_rank", f"{MIXER}.dt_rank", "auto"),
    Field("bias", "use_bias", f"{MIXER}.bias", False),
    Field("conv_bias", "use_conv_bias", f"{MIXER}.conv_bias", True),
    Field("tied", "tie_word_embeddings", lambda model: isinstance(model.head, TiedHead), True),
    Field("eps", "layer_norm_epsilon", "stack.norm.eps", 1e-5),
]
FIXED = {"hidden_act": ("silu", "swish"), "rms_norm": (True,), "ssm_cfg": ({}, None)}
# Initial values, kernels and rounding; and what older configs repeat under other names.
INERT = (
    *(f"time_step_{key}" for key in ("scale", "min", "max", "init_scheme", "floor")),
    *("rescale_prenorm_residual", "residual_in_fp32", "fused_add_norm", "use_mambapy"),
    *("use_associative_scan", "intermediate_size", "d_inner", "d_model", "n_layer"),
    "pad_vocab_size_multiple",
)


def weights(model: Decoder) -> list[Weight]:
    mixer = look_up(model, MIXER)
    rows = [
        Weight("norm/scale", "norm.weight"),
        Weight(("layer/up/kernel", "layer/gate/kernel"), "mixer.in_proj.weight", Linear()),
        Weight("layer/conv_kernel", "mixer.conv1d.weight", Same(lambda s: (s[0], 1, s[1]))),
        *projection("layer/select", "mixer.x_proj", bias=False),
        *projection("layer/dt", "mixer.dt_proj"),
        Weight("layer/A_log", "mixer.A_log"),
        Weight("layer/D", "mixer.D"),
        *projection("layer/out", "mixer.out_proj", bias=mixer.bias),
    ]
    if mixer.bias:
        rows.append(Weight(("layer/up/bias", "layer/gate/bias"), "mixer.in_proj.bias", Vector()))
    if mixer.conv_bias:
        rows.append(Weight("layer/conv_bias", "mixer.conv1d.bias"))
    tied = isinstance(model.head, TiedHead)
    return [
        Weight("embed/table", "backbone.embeddings.weight"),
        *in_layers(rows, "stack/pattern/blocks_0/mixer/", "backbone.layers.{}."),
        Weight("stack/norm/scale", "backbone.norm_f.weight"),
        *([] if tied else [Weight("head/kernel", "lm_head.weight", Linear())]),
    ]


FAMILY = Family(
    name="mamba",
    build=mamba,
    presets={
        "130m": {},
        "370m": dict(num_features=1024, num_layers=48),
        "790m": dict(num_features=1536, num_layers=48),
        "1.4b": dict(num_features=2048, num_layers=48),
        "2.8b": dict(num_features=2560, num_layers=64),
    },
    tiny=dict(vocab_size=61, num_features=32, num_layers=3, state_size=4),
    ledger=("B30", "B56"),
    classes={"mamba": "MambaForCausalLM"},
    fields=FIELDS,
    fixed=FIXED,
    inert=INERT,
    weights=weights,
    inapplicable={"bidirectional": "a recurrence sees only what is before; it raises ValueError"},
)
