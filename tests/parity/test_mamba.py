"""Mamba equals MambaForCausalLM."""

import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.models import params as P
from lm.models.families.mamba import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.conformance.harness import forward  # noqa: E402
from tests.parity import hf  # noqa: E402

SIZES = dict(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=3)
CHANGES = [
    pytest.param({}, id="plain"),
    pytest.param(
        dict(use_bias=True, use_conv_bias=False, conv_kernel=3, expand=3, time_step_rank=5),
        id="other sizes",
    ),
    pytest.param(dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3), id="untied"),
]


def make_torch(**changes):
    config = transformers.MambaConfig(**SIZES, **changes)
    return hf.randomize(transformers.MambaForCausalLM(config))


@pytest.mark.ledger("B30", "B56")
@pytest.mark.parametrize("changes", CHANGES)
def test_equals_transformers(changes):
    hf.assert_causal_lm_parity(FAMILY, make_torch(**changes))


@pytest.mark.ledger("B30")
def test_one_token_decode_equals_both_full_forwards():
    module = make_torch()
    model, params = hf.import_torch(FAMILY, module)
    tokens = hf.ids(61)
    full, _ = forward(model, params, tokens, Context())
    logits, state = forward(model, params, tokens[:, :1], Context(cache_length=24))
    pieces = [logits]
    for t in range(1, 24):
        logits, state = forward(model, params, tokens[:, t : t + 1], Context(), state)
        pieces.append(logits)
    stepped = jnp.concatenate(pieces, 1)
    assert np.abs(stepped - full).max() <= 1e-4
    with torch.no_grad():
        theirs = module(input_ids=torch.from_numpy(tokens).long(), use_cache=True)
    assert np.abs(stepped - theirs.logits.numpy()).max() <= 1e-4
    # Their cache of the last layer holds the same numbers, laid out (B, F, P) and (B, F, K).
    layer = state["layers"]["pattern"][0]["mixer"]
    ssm = theirs.cache_params.layers[-1].recurrent_states
    ssm = ssm[0] if isinstance(ssm, list | tuple | dict) else ssm
    assert np.abs(np.moveaxis(layer["ssm"][-1], 1, 2) - ssm.numpy()).max() <= 1e-4


@pytest.mark.ledger("B56")
def test_published_counts():
    assert P.count(FAMILY.preset("130m")) == 129_135_360
    assert P.count(FAMILY.preset("2.8b")) == 2_768_345_600


def test_published_config_is_read():
    """The keys that the directories of state-spaces/mamba-*-hf have."""
    config = dict(
        architectures=["MambaForCausalLM"], bos_token_id=0, conv_kernel=4, d_inner=1536,
        d_model=768, eos_token_id=0, expand=2, fused_add_norm=True, hidden_act="silu",
        hidden_size=768, initializer_range=0.1, intermediate_size=1536, layer_norm_epsilon=1e-05,
        model_type="mamba", n_layer=24, num_hidden_layers=24, pad_token_id=0,
        pad_vocab_size_multiple=8, rescale_prenorm_residual=False, residual_in_fp32=True,
        rms_norm=True, ssm_cfg={}, state_size=16, time_step_floor=0.0001,
        time_step_init_scheme="random", time_step_max=0.1, time_step_min=0.001, time_step_rank=48,
        time_step_scale=1.0, torch_dtype="float32", transformers_version="4.39.0.dev0",
        use_bias=False, use_cache=True, use_conv_bias=True, vocab_size=50280,
    )  # fmt: skip
    assert FAMILY.read_config(config) == FAMILY.preset("130m")
    for key, value in {"rms_norm": False, "hidden_act": "gelu"}.items():
        with pytest.raises(ValueError, match=key):
            FAMILY.read_config(config | {key: value})
