"""Caches of keys and values in fewer bits: their bytes, and what they change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import flatten
from lm.infer.generate import generate_tokens
from lm.layers import cache
from lm.layers.cache import Keys
from lm.models.families.llama import llama
from tests.conformance.harness import forward, random_tokens, tiny
from tests.infer.test_generate import nested, rows_of


@pytest.mark.parametrize("dtype, share", [("bfloat16", 2**-7), ("int8", 1 / 126.9)])
def test_each_number_is_off_by_half_a_step(dtype, share):
    """Of its own size in bfloat16, of the largest of its place and head in int8."""
    k, v = np.random.default_rng(0).normal(size=(2, 3, 7, 2, 8)).astype(np.float32)
    k[0, 0] = 0.0
    new = Keys(jnp.asarray(k), jnp.asarray(v), np.arange(7))
    state = cache.init(new, 16, dtype=dtype)
    one = Keys(new.k_BSKH[:, :1], new.v_BSKH[:, :1], np.arange(1))
    state, seen = cache.extend(state, one, jnp.int32(7))
    assert state["k"].dtype == jnp.dtype(dtype) and state["k"].shape == (3 * 2, 16, 8)
    for before, after in ((k, seen.k_BSKH), (v, seen.v_BSKH)):
        largest = np.abs(before) if dtype == "bfloat16" else np.abs(before).max(-1, keepdims=True)
        assert (np.abs(after[:, :7] - before) <= share / 2 * largest).all()
        np.testing.assert_array_equal(after[:, 7], after[:, 0])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bytes(dtype):
    """2 L B S K (H itemsize), and 4 more for each scale of int8, exactly."""
    model = llama(
        vocab_size=64, max_length=32, num_features=64, num_heads=4, num_kv_heads=2, num_layers=3
    )
    B, S, K, H = 5, 24, 2, 16
    tokens = jnp.ones((B, 5), jnp.int32)
    ctx = Context(cache_length=S, cache_dtype=dtype)
    _, state = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), tokens, ctx)[0])
    leaves = flatten(nested(state["layers"])).values()
    place = H * 2 if dtype == "bfloat16" else H + 4
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 2 * 3 * B * S * K * place


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_logits_stay_near_those_of_the_full_cache(name):
    """Within 1 % of the largest logit in bfloat16, 2 % in int8: two prompts and ten tokens."""
    model, params = tiny(name)
    tokens = random_tokens(model, (2, 16))

    def logits(dtype):
        found = []
        ctx = Context(cache_length=16, cache_dtype=dtype)
        _, state = forward(model, params, tokens[:, :6], ctx)
        for place in range(6, 16):
            one, state = forward(model, params, tokens[:, place, None], Context(), state)
            found.append(one)
        return jnp.concatenate(found, axis=1)

    full = logits(None)
    for dtype, share in (("bfloat16", 0.01), ("int8", 0.02)):
        off = jnp.abs(logits(dtype) - full).max() / jnp.abs(full).max()
        print(f"{name} {dtype}: {off:.1e} of the largest logit")
        assert 0 < off < share
    np.testing.assert_array_equal(logits("float32"), full)


@pytest.mark.slow
def test_a_key_s_text_does_not_depend_on_the_batch():
    """The bits of a cache are a setting like any other: batched and alone are the same."""
    model, params = tiny("gpt2")
    prompts = rows_of((3, 9), model.vocab_size)
    keys = jax.random.split(jax.random.key(1), 2)
    options = dict(max_new_tokens=12, temperature=1.5, cache_dtype="int8")
    together = generate_tokens(model, params, prompts, keys=keys, **options).rows()
    for index, row in enumerate(together):
        some = slice(index, index + 1)
        assert generate_tokens(model, params, prompts[some], keys=keys[some], **options).rows() == [
            row
        ]
    with pytest.raises(ValueError, match="cache_dtype is one of"):
        generate_tokens(model, params, prompts, max_new_tokens=2, cache_dtype="int4")
