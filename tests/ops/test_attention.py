"""Attention against torch, numpy loops and its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.layers.attention import Attention, CrossAttention
from lm.ops.attention import attend, attention_weights
from lm.ops.mask import Mask


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def brute_attention(q, k, v, allowed, scale=None, bias=None, softcap=None):
    """The definition, one query and one head at a time, in float64."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    out = np.zeros((B, T, N, v.shape[-1]))
    weights = np.zeros((B, N, T, S))
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys = [s for s in range(S) if allowed[b, t, s]]
                scores = []
                for s in keys:
                    score = float(q[b, t, n].astype(np.float64) @ k[b, s, n // (N // K)])
                    score *= H**-0.5 if scale is None else scale
                    if softcap is not None:
                        score = softcap * np.tanh(score / softcap)
                    scores.append(score + (0 if bias is None else bias[n, t, s]))
                if keys:
                    e = np.exp(np.array(scores) - max(scores))
                    weights[b, n, t, keys] = e / e.sum()
                    out[b, t, n] = weights[b, n, t, keys] @ v[b, keys, n // (N // K)]
    return out, weights


def make_mask(kind: str, T: int, S: int):
    """Returns a Mask and the (B, T, S) booleans that a naive reading of it gives, for B = 2."""
    index_T, index_S = np.arange(T) + (S - T), np.arange(S)
    segments = np.array([[1] * 3 + [2] * (S - 5) + [0] * 2, [1] * S])
    mask = Mask(jnp.asarray(index_T), jnp.asarray(index_S))
    allowed = np.ones((2, T, S), bool)
    for b in range(2):
        for t in range(T):
            for s in range(S):
                d = index_T[t] - index_S[s]
                if "causal" in kind and d < 0:
                    allowed[b, t, s] = False
                if "window" in kind and abs(d) >= 4:
                    allowed[b, t, s] = False
                q_segment, k_segment = segments[b, index_T[t]], segments[b, s]
                if "segments" in kind and (q_segment != k_segment or k_segment == 0):
                    allowed[b, t, s] = False
    mask = mask.replace(causal="causal" in kind, window=4 if "window" in kind else None)
    if "segments" in kind:
        mask = mask.replace(
            segments_BT=jnp.asarray(segments[:, S - T :]), segments_BS=jnp.asarray(segments)
        )
    return mask, allowed


@pytest.mark.ledger("N01", "N51")
@pytest.mark.parametrize("kind", ["full", "causal", "causal window", "causal segments", "segments"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_equals_brute_force(kind, heads):
    """Bidirectional, unidirectional and masked attention; weights are convex, masked ones 0."""
    N, K = heads
    T, S, H = 9, 9, 8
    q, k, v = draw(2, T, N, H), draw(2, S, K, H), draw(2, S, K, H, seed=5)
    mask, allowed = make_mask(kind, T, S)
    expected, expected_weights = brute_attention(q, k, v, allowed)
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-6)
    weights = np.asarray(attention_weights(q, k, mask))
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), allowed.any(-1)[:, None].repeat(N, 1), atol=1e-6)
    assert (weights[~np.broadcast_to(allowed[:, None], weights.shape)] == 0).all()


@pytest.mark.ledger("N51")
def test_cross_attention_equals_brute_force():
    """Queries and keys of two sequences of different lengths; the source's padding is unseen."""
    T, S, N, H = 5, 8, 4, 8
    q, k, v = draw(2, T, N, H), draw(2, S, N, H), draw(2, S, N, H, seed=5)
    segments = np.array([[1] * S, [1] * 5 + [0] * 3])
    mask = Mask(jnp.arange(T), jnp.arange(S), segments_BS=jnp.asarray(segments))
    expected, _ = brute_attention(q, k, v, np.repeat(segments[:, None] != 0, T, 1))
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-6)


def test_scale_bias_and_softcap_equal_brute_force():
    T, N, H = 7, 4, 8
    q, k, v, bias = draw(2, T, N, H), draw(2, T, 2, H), draw(2, T, 2, H, seed=5), draw(N, T, T)
    mask, allowed = make_mask("causal", T, T)
    options = dict(scale=0.7, softcap=1.5)
    expected, _ = brute_attention(q, k, v, allowed, bias=bias, **options)
    np.testing.assert_allclose(attend(q, k, v, mask, bias_NTS=bias, **options), expected, atol=1e-6)


@pytest.mark.ledger("N55")
def test_rows_without_keys_are_finite():
    """A query that may see nothing gets zeros, and so does its gradient."""
    q, k, v = draw(1, 4, 2, 8), draw(1, 4, 2, 8), draw(1, 4, 2, 8, seed=5)
    nothing = jnp.zeros((1, 4), jnp.int32)
    mask = Mask(jnp.arange(4), jnp.arange(4), nothing, nothing)

    def total(q):
        return attend(q, k, v, mask).sum()

    value, grad = jax.value_and_grad(total)(jnp.asarray(q))
    assert value == 0 and (grad == 0).all()


@pytest.mark.ledger("L36")
def test_grouped_queries_equal_repeated_keys():
    N, K, T, H = 6, 2, 9, 8
    q, k, v = draw(2, T, N, H), draw(2, T, K, H), draw(2, T, K, H, seed=5)
    mask, _ = make_mask("causal", T, T)
    repeated = attend(q, k.repeat(N // K, axis=2), v.repeat(N // K, axis=2), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), repeated, atol=1e-6)


@pytest.mark.ledger("L36")
def test_cache_bytes_shrink_by_the_group():
    """The KV cache of grouped-query attention is exactly kv_heads / heads of the full one."""

    def cache_bytes(kv_heads):
        layer = Attention(num_heads=8, head_dim=4, num_kv_heads=kv_heads)
        ctx = Context(cache_length=16, causal=True)
        x = jnp.zeros((2, 3, 32))
        _, state = jax.eval_shape(
            lambda: layer.init_with_output(jax.random.key(0), x, ctx, None)[0]
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    assert cache_bytes(8) == 2 * 2 * 16 * 8 * 4 * 4
    assert cache_bytes(2) * 8 == cache_bytes(8) * 2


MHA_MASKS = ["none", "causal", "padding", "both"]


@pytest.mark.ledger("B21")
@pytest.mark.parametrize("kind", MHA_MASKS)
def test_equals_torch_multihead_attention(kind):
    """Outputs and all gradients, with torch's packed weights copied in."""
    torch = pytest.importorskip("torch")
    D, N, T = 32, 4, 9
    theirs = torch.nn.MultiheadAttention(D, N, batch_first=True)
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            parameter.copy_(torch.from_numpy(draw(*parameter.shape, seed=index) * 0.3))
    x = draw(2, T, D)
    padding = np.zeros((2, T), bool)
    if kind in ("padding", "both"):
        padding[1, 6:] = True
    causal = torch.ones(T, T).triu(1).bool() if kind in ("causal", "both") else None
    x_torch = torch.from_numpy(x).requires_grad_()
    out, _ = theirs(
        x_torch, x_torch, x_torch, attn_mask=causal, key_padding_mask=torch.from_numpy(padding)
    )
    weights = draw(2, T, D, seed=9) * ~padding[..., None]
    (out * torch.from_numpy(weights)).sum().backward()

    H = D // N

    def params_of(in_weight, in_bias, out_weight, out_bias):
        params = {
            name: {"kernel": w.T.reshape(D, N, H), "bias": b.reshape(N, H)}
            for name, w, b in zip("qkv", np.split(in_weight, 3), np.split(in_bias, 3))
        }
        return params | {"out": {"kernel": out_weight.T.reshape(N, H, D), "bias": out_bias}}

    names = (
        theirs.in_proj_weight,
        theirs.in_proj_bias,
        theirs.out_proj.weight,
        theirs.out_proj.bias,
    )
    params = params_of(*(p.detach().numpy() for p in names))
    layer = Attention(N, H, qkv_bias=True, out_bias=True)
    segments = jnp.asarray(~padding, jnp.int32)
    ctx = Context(causal=causal is not None, segments_BT=segments, segments_BS=segments)

    def total(params, x):
        y, _ = layer.apply({"params": params}, x, ctx, None)
        return (y * weights).sum(), y

    (_, ours), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(params, jnp.asarray(x))
    keep = ~padding
    np.testing.assert_allclose(np.asarray(ours)[keep], out.detach().numpy()[keep], atol=1e-5)
    np.testing.assert_allclose(grads[1], x_torch.grad.numpy(), atol=1e-5)
    expected = params_of(*(p.grad.numpy() for p in names))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads[0], expected)


def test_cross_attention_layer_reads_the_memory_once():
    """Decoding with the cached memory equals attending to it afresh."""
    layer = CrossAttention(4, 8)
    x, memory = jnp.asarray(draw(2, 5, 32)), jnp.asarray(draw(2, 7, 32))
    ctx = Context(memory_BSD=memory)
    params = layer.init(jax.random.key(0), x, ctx, None)["params"]
    full, none = layer.apply({"params": params}, x, ctx, None)
    assert none is None
    first, state = layer.apply({"params": params}, x[:, :2], ctx.replace(cache_length=8), None)
    rest, _ = layer.apply({"params": params}, x[:, 2:], Context(), state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), full, atol=1e-6)
