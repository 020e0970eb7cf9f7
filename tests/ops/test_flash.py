"""Attention in blocks against attention at once, which others check against its definition."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops import flash
from lm.ops.attention import attend
from lm.ops.mask import Mask

N, K, H = 4, 2, 8
SEGMENTS = np.array([[1] * 7 + [2] * 9 + [3] * 2 + [0] * 3, [1] * 21])
KINDS = {
    "full": dict(),
    "causal": dict(causal=True),
    "window": dict(window=5),
    "causal window": dict(causal=True, window=6),
    "prefix": dict(causal=True, prefix_B=jnp.array([4, 11])),
    "segments": dict(causal=True, segments=True),
    "sinks and soft-cap": dict(causal=True, window=9, sink=True, softcap=1.5, scale=0.7),
    "bias": dict(bias=True),
    "all of it": dict(causal=True, segments=True, bias=True, sink=True, softcap=2.0),
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def case(kind, T=21, dtype=jnp.float32):
    """Returns float operands by name, the mask, and the options of `attend`."""
    options = dict(KINDS[kind])
    floats = dict(q=draw(2, T, N, H), k=draw(2, T, K, H, seed=1), v=draw(2, T, K, H, seed=2))
    floats = {name: x.astype(dtype) for name, x in floats.items()}
    if options.pop("bias", False):
        floats["bias_NTS"] = draw(N, T, T, seed=3)
    if options.pop("sink", False):
        floats["sink_N"] = draw(N, seed=4)
    fields = {n: options.pop(n) for n in ("causal", "window", "prefix_B") if n in options}
    if options.pop("segments", False):
        fields |= dict(segments_BT=jnp.asarray(SEGMENTS), segments_BS=jnp.asarray(SEGMENTS))
    return floats, Mask(jnp.arange(T), jnp.arange(T), **fields), options


def run(function, floats, mask, options, known=False):
    """Returns outputs, and the gradients of a random weighing of them.

    `known`: whether the places of the mask are known while the program is traced.
    """
    weigh = draw(2, floats["q"].shape[1], N, H, seed=9)

    index_T, index_S = (np.asarray(x) for x in (mask.index_T, mask.index_S))

    @jax.jit
    def both(floats, mask):
        if known:
            mask = mask.replace(index_T=index_T, index_S=index_S)

        def total(floats):
            rest = {n: x for n, x in floats.items() if n not in "qkv"}
            out = function(floats["q"], floats["k"], floats["v"], mask, **rest, **options)
            return (out * weigh).sum(), out

        (_, out), grads = jax.value_and_grad(total, has_aux=True)(floats)
        return out, grads

    return both(floats, mask)


@pytest.mark.ledger("B24", "L52")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [4, 32])
def test_equals_the_reference(kind, block):
    """Forwards and backwards, for every mask, whether blocks divide the length or not."""
    agrees(kind, block, known=True)


@pytest.mark.parametrize("kind", ["window", "all of it"])
def test_places_that_only_the_program_knows(kind):
    agrees(kind, 4, known=False)


def agrees(kind, block, known):
    floats, mask, options = case(kind)
    expected, their_grads = run(attend, floats, mask, options)
    out, grads = run(flash.flash_attend, floats, mask, dict(options, block=block), known)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for name, grad in grads.items():
        scale = float(jnp.abs(their_grads[name]).max())
        np.testing.assert_allclose(grad, their_grads[name], atol=2e-6 * scale, err_msg=name)


def test_low_precision_is_summed_in_fp32():
    """bfloat16 operands give what the reference gives for them, to their rounding."""
    floats, mask, options = case("causal window", dtype=jnp.bfloat16)
    expected, their_grads = run(attend, floats, mask, options)
    out, grads = run(flash.flash_attend, floats, mask, dict(options, block=8))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, expected)), atol=2e-2)
    for name, grad in grads.items():
        assert grad.dtype == jnp.bfloat16
        pair = (np.asarray(x, np.float32) for x in (grad, their_grads[name]))
        np.testing.assert_allclose(*pair, atol=6e-2, err_msg=name)


def test_rows_without_keys_are_zero():
    nothing = jnp.zeros((2, 21), jnp.int32)
    floats, mask, options = case("causal")
    mask = mask.replace(segments_BT=nothing, segments_BS=nothing)
    out, grads = run(flash.flash_attend, floats, mask, dict(options, block=8))
    assert (out == 0).all() and all((grad == 0).all() for grad in grads.values())


def test_places_of_a_cache():
    """Few queries, and keys up to their own slots, as in decoding with room left."""
    T, S = 3, 19
    q, k, v = draw(2, T, N, H), draw(2, S, K, H, seed=1), draw(2, S, K, H, seed=2)
    segments_BS = jnp.asarray((np.arange(S) < 10).astype(np.int32))[None].repeat(2, 0)
    mask = Mask(jnp.arange(T) + 7, jnp.arange(S), segments_BS=segments_BS, causal=True)
    out = flash.flash_attend(q, k, v, mask, block=8)
    np.testing.assert_allclose(out, attend(q, k, v, mask), atol=2e-6)


def products(monkeypatch, length, block, known=True, **fields):
    """Counts the blocks of scores that a forward and a backward pass really compute."""
    counted = []
    scores = flash._scores

    def count(*args):
        jax.debug.callback(lambda: counted.append(1))
        return scores(*args)

    monkeypatch.setattr(flash, "_scores", count)
    x = draw(1, length, 1, H)

    def total(x, index):
        mask = Mask(np.arange(length) if known else index, np.arange(length), **fields)
        return flash.flash_attend(x, x, x, mask, block=block).sum()

    jax.block_until_ready(jax.jit(jax.grad(total))(x, jnp.arange(length)))
    jax.effects_barrier()
    monkeypatch.undo()
    return len(counted)


@pytest.mark.perf
@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
def test_windows_and_causality_spare_products(monkeypatch, known):
    """A window costs O(T W): the count is that of the blocks it touches, linear in the length."""
    block, window = 16, 24
    for length in (128, 256):
        blocks = length // block

        def count(block=block, length=length, **fields):
            return products(monkeypatch, length, block, known, **fields)

        assert count() == 2 * blocks**2
        assert count(causal=True) == blocks * (blocks + 1)
        # A block of queries touches its own block and the ceil((W - 1) / C) before it.
        touched = sum(min(n + 1, 1 + -(-(window - 1) // block)) for n in range(blocks))
        assert count(causal=True, window=window) == 2 * touched


def test_rounds_are_products_and_known_to_the_compiler():
    """No round of a loop is idle: a window of W takes O(T W) of them, and the program says so."""

    def rounds(T, **fields):
        x = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)
        mask = Mask(np.arange(T), np.arange(T), **fields)
        loss = jax.grad(lambda x: flash.flash_attend(x, x, x, mask, block=64).sum())
        text = jax.jit(loss).lower(x).compile().as_text()
        return [int(n) for n in re.findall(r'"known_trip_count":{"n":"(\d+)"}', text)]

    assert rounds(512) == [64, 64]
    assert rounds(512, causal=True) == [36, 36]
    # Two blocks for each but the first.
    assert rounds(512, causal=True, window=65) == [15, 15]
    assert rounds(1024, causal=True, window=65) == [31, 31]


@pytest.mark.perf
@pytest.mark.ledger("B24")
def test_memory_is_linear_in_the_length():
    """Bytes of temporaries of forward and backward, as XLA counts them; time stays quadratic."""

    def temporaries(backend, T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        mask = Mask(jnp.arange(T), jnp.arange(T), causal=True)
        loss = jax.grad(lambda q, k, v: attend(q, k, v, mask, backend=backend).sum(), (0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    ours = [temporaries("flash", T) for T in (2048, 4096, 8192, 16384)]
    theirs = [temporaries("reference", T) for T in (1024, 2048)]
    for small, large in itertools.pairwise(ours):
        assert math.log2(large / small) <= 1.1
    assert math.log2(theirs[1] / theirs[0]) > 1.8
    assert theirs[1] > 5 * ours[0]


def test_unknown_backend():
    floats, mask, _ = case("causal")
    with pytest.raises(ValueError, match="auto, reference, flash, cudnn, splash, not 'flsh'"):
        attend(floats["q"], floats["k"], floats["v"], mask, backend="flsh")
