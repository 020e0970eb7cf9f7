"""Attention a block of scores at a time, with memory linear in the length, on any platform.

The softmax is taken online (Milakov and Gimelshein, 2018), and the backward pass makes the scores
again from the saved normalisers (Rabe and Staats, 2021; Dao et al., 2022). One loop runs over the
pairs of a block of queries and a block of keys which the mask lets see each other, and over no
others: causality costs half of the pairs, a window of W places O(T W). Where the places are known
before the program runs, so is the number of rounds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.mesh import target_platform
from lm.ops.mask import Mask
from lm.ops.softcap import soft_cap, soft_cap_slope

Array = jax.Array


class Settings(NamedTuple):
    """What does not change from block to block; all static.

    Attributes:
      scale, softcap: as of `lm.ops.attention.attend`.
      block: queries, and keys, of a block.
      rounds: how many pairs of blocks there are; None where only the running program knows.
    """

    scale: float
    softcap: float | None
    block: int
    rounds: int | None


class Pairs(NamedTuple):
    """The pairs of blocks whose scores are computed, in order.

    Attributes:
      t_P, s_P: numbers of the blocks of queries and of keys.
      count: how many pairs there are, the first of those.
    """

    t_P: Array | np.ndarray
    s_P: Array | np.ndarray
    count: Array | int


def pairs_of(mask: Mask, block: int) -> Pairs:
    """Returns the pairs of blocks that see each other, all keys of a block of queries in turn."""
    reach = mask.reach(block)
    if isinstance(reach, np.ndarray):
        t_P, s_P = (x.astype(np.int32) for x in np.nonzero(reach))
        return Pairs(t_P, s_P, len(t_P))
    t_P, s_P = jnp.nonzero(reach, size=reach.size, fill_value=0)
    return Pairs(t_P, s_P, reach.sum())


def flash_attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
    block: int | None = None,
) -> Array:
    """Returns what `lm.ops.attention.attend` does; arguments as there.

    Args:
      block: queries, and keys, whose scores are held at a time; (B, N, block, block) fp32 they are.
        None is 128 on a CPU, where it was the fastest, and 256 elsewhere.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    if block is None:
        block = 128 if target_platform() == "cpu" else 256
    block = min(block, max(T, S))
    mask = _padded_mask(mask, -T % block, -S % block)
    pairs = pairs_of(mask, block)
    rounds = pairs.count if isinstance(pairs.count, int) else None
    settings = Settings(H**-0.5 if scale is None else scale, softcap, block, rounds)
    q = _in_blocks(q_BTNH.reshape(B, T, K, G, H), block)
    k, v = _in_blocks(k_BSKH, block), _in_blocks(v_BSKH, block)
    bias_KGTS = sink_KG = None
    if bias_NTS is not None:
        bias_KGTS = _pad(_pad(bias_NTS, 1, block), 2, block)
        bias_KGTS = bias_KGTS.reshape(K, G, *bias_KGTS.shape[1:])
    if sink_N is not None:
        sink_KG = sink_N.astype(jnp.float32).reshape(K, G)
    out = _flash(settings, q, k, v, bias_KGTS, sink_KG, mask, pairs)
    out_BTKGH = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, K, G, v.shape[-1])
    return out_BTKGH[:, :T].reshape(B, T, N, v.shape[-1])


def _in_blocks(x_BT: Array, block: int) -> Array:
    """(B, T, heads, H) -> (blocks, B, heads, C, H), so that a block lies in one piece of memory."""
    x = _pad(x_BT, 1, block)
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


def _pad(x: Array, axis: int, block: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _padded_mask(mask: Mask, more_t: int, more_s: int) -> Mask:
    """Returns a mask of whole blocks, in which no query sees the keys of the padding."""
    if more_s and mask.segments_BS is None:
        mask = mask.replace(segments_BS=jnp.ones((1, len(mask.index_S)), jnp.int32))
    xp = np if mask.is_known() else jnp

    def pad(a: Array | None, more: int) -> Array | None:
        return None if a is None else jnp.pad(a, [(0, 0), (0, more)])

    return mask.replace(
        # The last place again, so that padding reaches no further than what is there.
        index_T=xp.pad(mask.index_T, (0, more_t), "edge"),
        index_S=xp.pad(mask.index_S, (0, more_s), "edge"),
        segments_BT=pad(mask.segments_BT, more_t),
        segments_BS=pad(mask.segments_BS, more_s),
    )


class Block(NamedTuple):
    """The operands of one block of scores."""

    q_BKGCH: Array
    k_BKCH: Array
    bias_KGCC: Array | None
    mask: Mask


def _scores(settings: Settings, block: Block) -> tuple[Array, Array]:
    """Returns the (B, K, G, C, C) fp32 scores, -inf where masked, and before bias and mask."""
    raw = _dot("bkgth,bksh->bkgts", block.q_BKGCH, block.k_BKCH) * settings.scale
    raw = soft_cap(raw, settings.softcap)
    scores = raw if block.bias_KGCC is None else raw + block.bias_KGCC.astype(jnp.float32)
    return jnp.where(block.mask.allowed()[:, None, None], scores, -jnp.inf), raw


def _dot(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _block(settings: Settings, q, k, bias, mask: Mask, t: Array, s: Array) -> Block:
    """Returns block t of the queries and block s of the keys."""
    size = settings.block
    if bias is not None:
        starts = (0, 0, t * size, s * size)
        bias = jax.lax.dynamic_slice(bias, starts, (*bias.shape[:2], size, size))
    return Block(_at(q, t), _at(k, s), bias, mask.part(t * size, size, s * size, size))


def _at(x: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _put(x: Array, part: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, part, index, 0)


def _loop(settings: Settings, pairs: Pairs, add: Callable, carry: Any) -> Any:
    """Calls `add(t, s, carry)` for each pair."""
    count = pairs.count if settings.rounds is None else settings.rounds
    t_P, s_P = jnp.asarray(pairs.t_P), jnp.asarray(pairs.s_P)

    def step(i, carry):
        return add(t_P[i], s_P[i], carry)

    return jax.lax.fori_loop(0, count, step, carry)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings: Settings, q, k, v, bias, sink, mask: Mask, pairs: Pairs) -> Array:
    return _forward(settings, q, k, v, bias, sink, mask, pairs)[0]


def _forward(settings: Settings, q, k, v, bias, sink, mask: Mask, pairs: Pairs):
    """Returns (blocks, B, K, G, C, H) outputs, and what the backward pass needs."""

    def add(t, s, carry):
        largest, total, out = (_at(x, t) for x in carry)
        scores, _ = _scores(settings, _block(settings, q, k, bias, mask, t, s))
        new = jnp.maximum(largest, scores.max(axis=-1))
        # Where no key was seen yet there is nothing to scale, and -inf - -inf is NaN.
        safe = jnp.where(jnp.isneginf(new), 0.0, new)
        shrink = jnp.exp(largest - safe)
        weights = jnp.exp(scores - safe[..., None])
        more = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), _at(v, s))
        total = total * shrink + weights.sum(axis=-1)
        rows = (new, total, out * shrink[..., None] + more)
        return tuple(_put(x, part, t) for x, part in zip(carry, rows))

    largest = jnp.full(q.shape[:-1], -jnp.inf)
    total = jnp.zeros(q.shape[:-1])
    if sink is not None:
        largest, total = jnp.broadcast_to(sink[..., None], largest.shape), total + 1
    out = jnp.zeros((*q.shape[:-1], v.shape[-1]))
    largest, total, out = _loop(settings, pairs, add, (largest, total, out))
    some = total > 0
    total = jnp.where(some, total, 1.0)
    # ln of the sum of exp(score); +inf makes all weights of a row without keys 0.
    normaliser = jnp.where(some, largest + jnp.log(total), jnp.inf)
    out = (out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, bias, sink, mask, pairs, out, normaliser)


def _backward(settings: Settings, saved, grad_out: Array):
    q, k, v, bias, sink, mask, pairs, out, normaliser = saved
    # Every score gets weight * (its own gradient - this).
    mean = jnp.sum(grad_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def add(t, s, carry):
        grad_q, grad_k, grad_v, grad_bias = carry
        block = _block(settings, q, k, bias, mask, t, s)
        scores, raw = _scores(settings, block)
        weights = jnp.exp(scores - _at(normaliser, t)[..., None])
        rows_grad = _at(grad_out, t)
        # Keys come last here: in the other order XLA's CPU backend takes 1.5 times as long.
        more_v = _dot("bkgth,bkgts->bkhs", rows_grad, weights.astype(v.dtype))
        own = _dot("bkgth,bksh->bkgts", rows_grad, _at(v, s))
        grad = weights * (own - _at(mean, t)[..., None])
        if grad_bias is not None:
            starts = (0, 0, t * settings.block, s * settings.block)
            grad_bias = jax.lax.dynamic_update_slice(grad_bias, grad.sum(axis=0), starts)
        if settings.softcap is not None:
            grad *= soft_cap_slope(raw, settings.softcap)
        grad = (grad * settings.scale).astype(k.dtype)
        more_q = _dot("bkgts,bksh->bkgth", grad, block.k_BKCH)
        more_k = _dot("bkgth,bkgts->bkhs", block.q_BKGCH, grad)
        grad_q = _put(grad_q, _at(grad_q, t) + more_q, t)
        grad_k = _put(grad_k, _at(grad_k, s) + more_k, s)
        grad_v = _put(grad_v, _at(grad_v, s) + more_v, s)
        return grad_q, grad_k, grad_v, grad_bias

    operands = (q, k.mT, v.mT, bias)
    zeros = [None if x is None else jnp.zeros(x.shape, jnp.float32) for x in operands]
    grads = _loop(settings, pairs, add, tuple(zeros))
    grads = [None if x is None else grad.astype(x.dtype) for x, grad in zip(operands, grads)]
    grad_q, grad_k, grad_v, grad_bias = grads
    grad_sink = None
    if sink is not None:
        lost = jnp.exp(sink[..., None] - normaliser) * mean
        grad_sink = -lost.sum(axis=(0, 1, 4))
    grads = grad_q, grad_k.mT, grad_v.mT, grad_bias, grad_sink
    return *grads, *jax.tree.map(_no_gradient, (mask, pairs))


def _no_gradient(x: Any) -> np.ndarray:
    return np.zeros(np.shape(x), jax.dtypes.float0)


_flash.defvjp(_forward, _backward)
