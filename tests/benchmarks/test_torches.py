"""What is the same in peers on torch: the function, and what decays."""

import jax
import numpy as np
import pytest

from lm.core.paths import flatten
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.optimizer import is_matrix
from tests.conformance.harness import forward, random_params, random_tokens

torch = pytest.importorskip("torch")

from benchmarks.torches import DECAY, PostNorm, groups, litgpt_tensors  # noqa: E402
from lm.core.context import Context  # noqa: E402


@pytest.fixture(scope="module")
def pair():
    model = teeny_gpt(num_features=16, num_heads=4, num_layers=3, mlp_multiplier=4, max_length=20)
    params = random_params(model)
    theirs = PostNorm({path: np.asarray(leaf) for path, leaf in flatten(params).items()})
    return model, params, theirs


def test_the_encoder_is_our_post_norm_decoder(pair):
    model, params, theirs = pair
    tokens = random_tokens(model)
    ours, _ = forward(model, params, tokens, Context())
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(tokens)).long())
    assert np.abs(np.asarray(ours) - expected.numpy()).max() <= 1e-5


def test_the_same_weights_decay(pair):
    _, params, theirs = pair
    ours = sum(leaf.size for path, leaf in flatten(params).items() if is_matrix(path))
    decayed, kept = groups(theirs)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (DECAY, 0.0)
    assert sum(parameter.numel() for parameter in decayed["params"]) == ours
    everything = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(parameter.numel() for parameter in kept["params"]) == everything - ours


def test_names_of_litgpt():
    parts = {f"self_attn.{name}_proj": torch.full((2, 2), i) for i, name in enumerate("qkvo")}
    block = {
        **parts,
        **{f"mlp.{name}_proj": torch.zeros(1) for name in ("gate", "up", "down")},
        **{name: torch.zeros(1) for name in ("input_layernorm", "post_attention_layernorm")},
    }
    tensors = {f"model.layers.0.{name}.weight": tensor for name, tensor in block.items()}
    tensors |= {
        f"{name}.weight": torch.zeros(1) for name in ("model.embed_tokens", "model.norm", "lm_head")
    }
    found = litgpt_tensors(tensors, 1)
    assert len(found) == 3 + 7
    assert found["transformer.h.0.attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert found["transformer.h.0.attn.proj.weight"][0, 0] == 3
