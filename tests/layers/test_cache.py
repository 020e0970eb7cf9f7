"""The cache of a window against one that keeps everything, and the whole row read at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.infer.generate import generate_tokens
from lm.layers import cache
from lm.layers.cache import Keys
from lm.models import params as P
from lm.models.families.gpt2 import gpt2
from lm.models.families.llama import FAMILY

W = 5
VOCAB = 61
LENGTHS = (4, 9, 12)  # Of the prompts: shorter than the window, and longer.


@pytest.fixture(scope="module")
def model():
    return FAMILY.build(**{**FAMILY.tiny, "window": W})


@pytest.fixture(scope="module")
def params(model):
    return P.init(model, jax.random.key(0))


def rows(new):
    """Returns left-padded tokens and their segments: the prompts, and `new` more tokens each."""
    width = max(LENGTHS) + new
    tokens = np.random.default_rng(0).integers(1, VOCAB, (len(LENGTHS), width))
    segments = np.array([[0] * (max(LENGTHS) - n) + [1] * (n + new) for n in LENGTHS])
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)


@partial(jax.jit, static_argnames="model")
def read(model, params, tokens, ctx, state=None):
    return model.apply({"params": params}, tokens, ctx, state)


def in_steps(model, params, steps):
    """Returns the logits of all places, read in pieces of so many tokens, and the last state."""
    tokens, segments = rows(sum(steps))
    ctx = Context(segments_BT=segments[:, : max(LENGTHS)], cache_length=tokens.shape[1])
    logits, state = read(model, params, tokens[:, : max(LENGTHS)], ctx)
    found, place = [logits], max(LENGTHS)
    for step in steps:
        logits, state = read(model, params, tokens[:, place : place + step], Context(), state)
        found.append(logits)
        place += step
    return jnp.concatenate(found, axis=1), state


def keep_all(monkeypatch):
    init, extend = cache.init, cache.extend
    monkeypatch.setattr(cache, "init", lambda new, slots, *_: init(new, slots))
    monkeypatch.setattr(cache, "extend", lambda s, new, slot, window: extend(s, new, slot))
    jax.clear_caches()


@pytest.mark.ledger("L41")
def test_window_gives_the_logits_of_the_full_cache(model, params, monkeypatch):
    """Prompts on either side of the window, padded on the left; then tokens, and whole turns."""
    steps = (1, 1, 3, 1, 1, 1, 8, 1, 1, 3, 1, 1, 1, 1, 1, 1)
    ours, small = in_steps(model, params, steps)
    keep_all(monkeypatch)
    theirs, full = in_steps(model, params, steps)
    tokens, segments = rows(sum(steps))
    whole, _ = read(model, params, tokens, Context(segments_BT=segments))
    seen = np.asarray(segments) != 0
    np.testing.assert_allclose(ours[seen], theirs[seen], atol=1e-5)
    np.testing.assert_allclose(ours[seen], whole[seen], atol=1e-5)
    for state, slots in ((small, W), (full, tokens.shape[1])):
        kept = state["layers"]["pattern"][0]["mixer"]
        assert {leaf.shape[-2] for leaf in kept.values()} == {slots}
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.ledger("L41")
def test_bytes_do_not_grow_with_the_length():
    """Of GPT-3's layers the banded half keeps W places, and the other half all of them."""
    model = gpt2(VOCAB, 4096, num_features=32, num_heads=4, num_layers=4, window=256)

    def of_layers(length):
        tokens = jnp.zeros((2, 8), jnp.int32)
        params = jax.eval_shape(partial(P.init, model), jax.random.key(0))
        ctx = Context(cache_length=length)
        _, state = jax.eval_shape(
            lambda params: model.apply({"params": params}, tokens, ctx), params
        )
        blocks = state["layers"]["pattern"]
        return [sum(leaf.size * 4 for leaf in jax.tree.leaves(block)) for block in blocks]

    for length in (512, 4096):
        full, banded = of_layers(length)
        assert full == 2 * 2 * 2 * length * 32 * 4 and banded * length == full * 256


@pytest.mark.slow
def test_generation_does_not_depend_on_the_cache(model, params):
    prompts = [[1, 5, 9], list(range(2, 14))]
    options = dict(max_new_tokens=14, seed=3)
    ours = generate_tokens(model, params, prompts, **options)
    theirs = generate_tokens(model, params, prompts, cache=False, **options)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("steps", [(1,) * 9, pytest.param((7, 2, 1, 5), marks=pytest.mark.slow)])
def test_places_say_what_the_slots_hold(steps):
    """Keys that are their own places: each is where its place is said to be, or is empty."""

    def keys(start, count):
        places = jnp.arange(start, start + count)
        x = jnp.broadcast_to(places[None, :, None, None].astype(jnp.float32) + 1, (1, count, 1, 2))
        return Keys(x, x, places)

    place = 3
    state = cache.init(keys(0, place), 40, W)
    for step in steps:
        state, seen = cache.extend(state, keys(place, step), jnp.int32(place), W)
        place += step
        held = np.asarray(seen.k_BSKH)[0, :, 0, 0]
        index = np.asarray(seen.index_S)
        np.testing.assert_array_equal(held, np.where(index < 0, 0, index + 1))
        # All that the first of the new queries, and the last, may look at.
        assert {*range(max(0, place - step - W + 1), place)} <= {*index.tolist()}
        of_places = np.asarray(seen.of(jnp.arange(100)[None] * 10))
        np.testing.assert_array_equal(of_places[0], np.maximum(index, 0) * 10)
