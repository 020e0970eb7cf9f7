"""Attention a block of scores at a time, with memory linear in the length, on any platform.

The softmax is taken online (Milakov and Gimelshein, 2018), and the backward pass makes the scores
again from the saved normalisers (Rabe and Staats, 2021; Dao et al., 2022). Blocks that the mask
leaves empty, by causality or by a window, are not computed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.ops.mask import Mask

Array = jax.Array


class Settings(NamedTuple):
    """What does not change from block to block; all static.

    Attributes:
      scale, softcap: as of `lm.ops.attention.attend`.
      block: queries, and keys, of a block.
    """

    scale: float
    softcap: float | None
    block: int


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
    block: int = 256,
) -> Array:
    """Returns what `lm.ops.attention.attend` does; arguments as there.

    Args:
      block: queries, and keys, whose scores are held at a time; (B, N, block, block) fp32 they are.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    block = min(block, max(T, S))
    settings = Settings(H**-0.5 if scale is None else scale, softcap, block)
    mask = _padded_mask(mask, -T % block, -S % block)
    q_BKGTH = _pad(q_BTNH, 1, block).reshape(B, -1, K, G, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = (_pad(x, 1, block).swapaxes(1, 2) for x in (k_BSKH, v_BSKH))
    bias_KGTS = sink_KG = None
    if bias_NTS is not None:
        bias_KGTS = _pad(_pad(bias_NTS, 1, block), 2, block)
        bias_KGTS = bias_KGTS.reshape(K, G, *bias_KGTS.shape[1:])
    if sink_N is not None:
        sink_KG = sink_N.astype(jnp.float32).reshape(K, G)
    out_BKGTH = _flash(settings, q_BKGTH, k_BKSH, v_BKSH, bias_KGTS, sink_KG, mask)
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)[:, :T]
    return out_BTKGH.reshape(B, T, N, v_BSKH.shape[-1])


def _pad(x: Array, axis: int, block: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _padded_mask(mask: Mask, more_t: int, more_s: int) -> Mask:
    """Returns a mask of whole blocks, in which no query sees the keys of the padding."""
    if more_s and mask.segments_BS is None:
        mask = mask.replace(segments_BS=jnp.ones((1, len(mask.index_S)), jnp.int32))

    def pad(a: Array | None, more: int, mode: str) -> Array | None:
        return None if a is None else jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)], mode)

    return mask.replace(
        # The last place again, so that padding reaches no further than what is there.
        index_T=pad(mask.index_T, more_t, "edge"),
        index_S=pad(mask.index_S, more_s, "edge"),
        segments_BT=pad(mask.segments_BT, more_t, "constant"),
        segments_BS=pad(mask.segments_BS, more_s, "constant"),
    )


class Block(NamedTuple):
    """The operands of one block of scores."""

    q_BKGCH: Array
    k_BKCH: Array
    bias_KGCC: Array | None
    mask: Mask


def _scores(settings: Settings, block: Block) -> tuple[Array, Array]:
    """Returns the (B, K, G, C, C) fp32 scores, -inf where masked, and before bias and mask."""
    raw = jnp.einsum(
        "bkgth,bksh->bkgts", block.q_BKGCH, block.k_BKCH, preferred_element_type=jnp.float32
    )
    raw *= settings.scale
    if settings.softcap is not None:
        raw = settings.softcap * jnp.tanh(raw / settings.softcap)
    scores = raw if block.bias_KGCC is None else raw + block.bias_KGCC.astype(jnp.float32)
    return jnp.where(block.mask.allowed()[:, None, None], scores, -jnp.inf), raw


def _cut(x: Array, start: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _block(settings: Settings, q, k, bias, mask: Mask, t: Array, s: Array) -> Block:
    """Returns the block of the queries from place t on and the keys from place s on."""
    size = settings.block
    return Block(
        _cut(q, t, size, 3),
        _cut(k, s, size, 2),
        None if bias is None else _cut(_cut(bias, t, size, 2), s, size, 3),
        mask.part(t, size, s, size),
    )


def _reaching(settings: Settings, mask: Mask, t: Array, s: Array) -> Array:
    return mask.part(t, settings.block, s, settings.block).reaches()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings: Settings, q, k, v, bias, sink, mask: Mask) -> Array:
    return _forward(settings, q, k, v, bias, sink, mask)[0]


def _forward(settings: Settings, q, k, v, bias, sink, mask: Mask):
    """Returns (B, K, G, T, H) outputs, and what the backward pass needs."""
    B, K, G, T, _ = q.shape
    size = settings.block
    starts_s = jnp.arange(0, k.shape[2], size)

    def rows(_, t):
        def add(carry, s):
            def compute(carry):
                largest, total, out = carry
                scores, _ = _scores(settings, _block(settings, q, k, bias, mask, t, s))
                new = jnp.maximum(largest, scores.max(axis=-1))
                # Where no key was seen yet there is nothing to scale, and -inf - -inf is NaN.
                safe = jnp.where(jnp.isneginf(new), 0.0, new)
                shrink = jnp.exp(largest - safe)
                weights = jnp.exp(scores - safe[..., None])
                more = jnp.einsum(
                    "bkgts,bksh->bkgth",
                    weights.astype(v.dtype),
                    _cut(v, s, size, 2),
                    preferred_element_type=jnp.float32,
                )
                total = total * shrink + weights.sum(axis=-1)
                return new, total, out * shrink[..., None] + more

            return jax.lax.cond(_reaching(settings, mask, t, s), compute, lambda c: c, carry), None

        largest = jnp.full((B, K, G, size), -jnp.inf)
        total = jnp.zeros((B, K, G, size))
        if sink is not None:
            largest, total = jnp.broadcast_to(sink[..., None], largest.shape), total + 1
        out = jnp.zeros((B, K, G, size, v.shape[-1]))
        (largest, total, out), _ = jax.lax.scan(add, (largest, total, out), starts_s)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        # ln of the sum of exp(score); +inf makes all weights of a row without keys 0.
        normaliser = jnp.where(some, largest + jnp.log(total), jnp.inf)
        return None, ((out / total[..., None]).astype(v.dtype), normaliser)

    _, (out, normaliser) = jax.lax.scan(rows, None, jnp.arange(0, T, size))
    out, normaliser = _rows_joined(out), _rows_joined(normaliser)
    return out, (q, k, v, bias, sink, mask, out, normaliser)


def _rows_joined(x: Array) -> Array:
    """(blocks, B, K, G, C, ...) -> (B, K, G, T, ...)"""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _backward(settings: Settings, saved, grad_out: Array):
    q, k, v, bias, sink, mask, out, normaliser = saved
    size = settings.block
    starts_s = jnp.arange(0, k.shape[2], size)
    # Every score gets weight * (its own gradient - this), (B, K, G, T).
    mean = jnp.sum(grad_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def dot(letters: str, a: Array, b: Array) -> Array:
        return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)

    def rows(carry, t):
        rows_normaliser, rows_mean = (_cut(x, t, size, 3) for x in (normaliser, mean))
        rows_grad = _cut(grad_out, t, size, 3)

        def add(carry, s):
            def compute(carry):
                grad_q, (grad_k, grad_v, grad_bias) = carry
                block = _block(settings, q, k, bias, mask, t, s)
                scores, raw = _scores(settings, block)
                weights = jnp.exp(scores - rows_normaliser[..., None])
                low = weights.astype(v.dtype)
                more_v = dot("bkgts,bkgth->bksh", low, rows_grad)
                own = dot("bkgth,bksh->bkgts", rows_grad, _cut(v, s, size, 2))
                grad = weights * (own - rows_mean[..., None])
                if grad_bias is not None:
                    grad_bias = _add(grad_bias, grad.sum(axis=0), (2, t), (3, s))
                if settings.softcap is not None:
                    grad *= 1 - (raw / settings.softcap) ** 2
                grad = (grad * settings.scale).astype(k.dtype)
                grad_q += dot("bkgts,bksh->bkgth", grad, block.k_BKCH)
                more_k = dot("bkgts,bkgth->bksh", grad, block.q_BKGCH)
                grad_k, grad_v = _add(grad_k, more_k, (2, s)), _add(grad_v, more_v, (2, s))
                return grad_q, (grad_k, grad_v, grad_bias)

            return jax.lax.cond(_reaching(settings, mask, t, s), compute, lambda c: c, carry), None

        zeros = jnp.zeros((*q.shape[:3], size, q.shape[-1]))
        (grad_q, carry), _ = jax.lax.scan(add, (zeros, carry), starts_s)
        return carry, grad_q.astype(q.dtype)

    zeros = [x if x is None else jnp.zeros(x.shape, jnp.float32) for x in (k, v, bias)]
    (grad_k, grad_v, grad_bias), grad_q = jax.lax.scan(
        rows, tuple(zeros), jnp.arange(0, q.shape[3], size)
    )
    grad_sink = None
    if sink is not None:
        grad_sink = -(jnp.exp(sink[..., None] - normaliser) * mean).sum(axis=(0, 3))
    if grad_bias is not None:
        grad_bias = grad_bias.astype(bias.dtype)
    grads = _rows_joined(grad_q), grad_k.astype(k.dtype), grad_v.astype(v.dtype)
    return *grads, grad_bias, grad_sink, jax.tree.map(_no_gradient, mask)


def _add(x: Array, more: Array, *places: tuple[int, Array]) -> Array:
    """Adds to the part of `x` that begins at the given (axis, index) places."""
    starts: list[Any] = [0] * x.ndim
    for axis, index in places:
        starts[axis] = index
    part = jax.lax.dynamic_slice(x, starts, more.shape)
    return jax.lax.dynamic_update_slice(x, part + more, starts)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


_flash.defvjp(_forward, _backward)
