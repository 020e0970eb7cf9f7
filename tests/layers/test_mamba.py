"""Mamba's mixer: state against the whole, padding, documents, forms, and what it refuses."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import flatten, map_with_path
from lm.layers.block import Block, PreNorm
from lm.layers.embed import Embed
from lm.layers.head import TiedHead
from lm.layers.mamba import Mamba
from lm.layers.norm import RMSNorm
from lm.models import params as P
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.families.mamba import FAMILY
from lm.models.stack import Stack

B, T = 2, 13


def make(form=None, chunk=64):
    mixer = Mamba(24, state_size=4, conv_width=4, dt_rank=2, bias=True, form=form, chunk=chunk)
    model = Decoder(
        Embed(31, 16), Stack((Block(PreNorm(mixer, RMSNorm())),), 2, norm=RMSNorm()), TiedHead()
    )
    return model


@pytest.fixture(scope="module")
def params():
    def perturb(path, leaf):
        key = jax.random.fold_in(jax.random.key(1), sum(map(ord, path)))
        return leaf + 0.3 * jax.random.normal(key, leaf.shape)

    return map_with_path(perturb, P.init(make(), jax.random.key(0)))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (B, T)), jnp.int32)


@jax.jit
def apply(params, tokens, ctx=Context(), state=None):
    return make().apply({"params": params}, tokens, ctx, state)


def test_state_is_small_and_of_constant_size(params):
    _, state = apply(params, TOKENS, Context(cache_length=100))
    shapes = {path: leaf.shape for path, leaf in flatten(state["layers"]["pattern"][0]).items()}
    assert shapes == {"mixer/conv": (2, B, 3, 24), "mixer/ssm": (2, B, 4, 24)}
    _, bf16 = apply(params, TOKENS, Context(cache_length=100, dtype="bfloat16"))
    dtypes = {path: leaf.dtype for path, leaf in flatten(bf16["layers"]["pattern"][0]).items()}
    assert dtypes == {"mixer/conv": jnp.bfloat16, "mixer/ssm": jnp.float32}


@pytest.mark.parametrize("cuts", [range(T + 1), (0, 5, 6, 9, 13), (0, 2, 13)])
def test_continued_equals_the_whole(params, cuts):
    full, _ = apply(params, TOKENS)
    state, pieces = None, []
    for start, stop in pairwise(cuts):
        ctx = Context(cache_length=T) if state is None else Context()
        logits, state = apply(params, TOKENS[:, start:stop], ctx, state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=1e-5)


def test_prefill_takes_padding_on_either_side_and_between(params):
    """Rows padded left, right and in the middle continue as one that is not padded."""
    full, _ = apply(params, TOKENS)
    tokens = jnp.zeros((B, 12), jnp.int32).at[0, 4:9].set(TOKENS[0, :5])
    tokens = tokens.at[1, :5].set(TOKENS[1, :5])
    segments = jnp.zeros((B, 12), jnp.int32).at[0, 4:9].set(1).at[1, :5].set(1)
    first, state = apply(params, tokens, Context(segments_BT=segments, cache_length=30))
    np.testing.assert_allclose(first[0, 4:9], full[0, :5], atol=1e-5)
    np.testing.assert_allclose(first[1, :5], full[1, :5], atol=1e-5)
    tokens = jnp.zeros((B, 6), jnp.int32).at[0, 3:].set(TOKENS[0, 5:8])
    tokens = tokens.at[1, ::2].set(TOKENS[1, 5:8])
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]])
    second, state = apply(params, tokens, Context(segments_BT=segments), state)
    np.testing.assert_allclose(second[0, 3:], full[0, 5:8], atol=1e-5)
    np.testing.assert_allclose(second[1, ::2], full[1, 5:8], atol=1e-5)
    padding = Context(segments_BT=jnp.zeros((B, 1), jnp.int32))
    _, same = apply(params, TOKENS[:, :1], padding, state)
    jax.tree.map(np.testing.assert_array_equal, same["layers"], state["layers"])
    third, _ = apply(params, TOKENS[:, 8:9], Context(), same)
    np.testing.assert_allclose(third, full[:, 8:9], atol=1e-5)


def test_packed_prefill_continues_the_last_document(params):
    segments = jnp.asarray([[1] * 6 + [2] * 5] * B)
    _, state = apply(params, TOKENS[:, :11], Context(segments_BT=segments, cache_length=T))
    two = Context(segments_BT=jnp.full((B, 2), 2))
    logits, _ = apply(params, TOKENS[:, 11:], two, state)
    alone, _ = apply(params, TOKENS[:, 6:])
    np.testing.assert_allclose(logits, alone[:, -2:], atol=1e-5)


@pytest.mark.ledger("B30")
@pytest.mark.parametrize("form", ["associative", "sequential"])
def test_causal_bitwise_in_either_form(params, form):
    model = make(form, chunk=5)
    run = jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])
    before = run(TOKENS)
    for j in range(T):
        after = run(TOKENS.at[:, j].add(1) % 31)
        np.testing.assert_array_equal(before[:, :j], after[:, :j])
        assert (before[:, j] != after[:, j]).any()


@pytest.mark.ledger("B30")
def test_forms_agree(params):
    def loss(params, form, chunk):
        logits, _ = make(form, chunk).apply({"params": params}, TOKENS)
        return jnp.square(logits).mean(), logits

    results = [
        jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))(params, form, chunk)
        for form, chunk in [("sequential", 64), ("associative", 64), ("associative", 4)]
    ]
    (_, first), reference = results[0]
    for (_, logits), grads in results[1:]:
        np.testing.assert_allclose(logits, first, atol=1e-4)
        for path, grad in flatten(grads).items():
            np.testing.assert_allclose(grad, flatten(reference)[path], atol=1e-5, err_msg=path)


def test_bidirectional_is_refused():
    mixer = Mamba(24)
    stack = Stack((Block(PreNorm(mixer, RMSNorm())),), 2)
    with pytest.raises(ValueError, match="Mamba is a recurrence"):
        P.abstract(Encoder(Embed(31, 16), stack, TiedHead()))
    with pytest.raises(ValueError, match="Mamba is a recurrence"):
        model = FAMILY.build(**FAMILY.tiny)
        params = P.init(model, jax.random.key(0))
        model.apply({"params": params}, TOKENS, Context(causal=False))


def test_initial_values():
    """Decay rates are 1..P, D is 1, and step sizes lie in [0.001, 0.1], log-uniformly."""
    mixer = Mamba(512, state_size=8, dt_rank=4)
    x = jnp.zeros((1, 1, 16))
    params = mixer.init(jax.random.key(0), x, Context())["params"]
    rates = np.exp(jax.tree.leaves(params["A_log"])[0])
    np.testing.assert_allclose(rates, np.tile(np.arange(1, 9), (512, 1)), rtol=1e-6)
    np.testing.assert_array_equal(jax.tree.leaves(params["D"])[0], 1)
    log_dt = np.log(jax.nn.softplus(jax.tree.leaves(params["dt"]["bias"])[0]))
    assert np.log(1e-3) - 1e-4 <= log_dt.min() and log_dt.max() <= np.log(0.1) + 1e-4
    quartiles = np.quantile(log_dt, [0.25, 0.5, 0.75])
    expected = np.log(1e-3) + np.array([0.25, 0.5, 0.75]) * np.log(100)
    np.testing.assert_allclose(quartiles, expected, atol=0.35)


def test_bfloat16_stays_close(params):
    full, _ = apply(params, TOKENS)
    half, _ = apply(params, TOKENS, Context(dtype="bfloat16"))
    assert half.dtype == jnp.bfloat16
    scale = float(jnp.abs(full).max())
    assert float(jnp.abs(half.astype(jnp.float32) - full).max()) < 0.05 * scale
