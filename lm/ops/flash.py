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
        None is `default_block`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    block = min(block or default_block(), max(T, S))
    mask = pad_mask(mask, -T % block, -S % block)
    pairs = pairs_of(mask, block)
    rounds = pairs.count if isinstance(pairs.count, int) else None
    settings = Settings(H**-0.5 if scale is None else scale, softcap, block, rounds)
    q = in_blocks(q_BTNH.reshape(B, T, K, G, H), block)
    k, v = in_blocks(k_BSKH, block), in_blocks(v_BSKH, block)
    bias_KGTS = sink_KG = None
    if bias_NTS is not None:
        bias_KGTS = pad_blocks(pad_blocks(bias_NTS, 1, block), 2, block)
        bias_KGTS = bias_KGTS.reshape(K, G, *bias_KGTS.shape[1:])
    if sink_N is not None:
        sink_KG = sink_N.astype(jnp.float32).reshape(K, G)
    out = _flash(settings, q, Keys(k, v, bias_KGTS, mask, pairs), sink_KG)
    return from_blocks(out)[:, :T].reshape(B, T, N, v.shape[-1])


def default_block() -> int:
    """Returns 128 on a CPU, where it was the fastest, and 256 elsewhere."""
    return 128 if target_platform() == "cpu" else 256


def in_blocks(x_BT: Array, block: int) -> Array:
    """(B, T, heads, H) -> (blocks, B, heads, C, H), so that a block lies in one piece of memory."""
    x = pad_blocks(x_BT, 1, block)
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


def from_blocks(x: Array) -> Array:
    """(blocks, B, heads, C, H) -> (B, blocks C, heads, H), the way back."""
    x_BT = jnp.moveaxis(x, (0, -2), (1, 2))
    return x_BT.reshape(x_BT.shape[0], -1, *x_BT.shape[3:])


def pad_blocks(x: Array, axis: int, block: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def pad_mask(mask: Mask, more_t: int, more_s: int) -> Mask:
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


class Keys(NamedTuple):
    """Keys that queries meet, and what is between the two.

    Attributes:
      k, v: (blocks, B, K, C, H).
      bias_KGTS: on their scores, or None.
      mask: of the queries and these keys, both of whole blocks.
      pairs: of blocks that see each other by this mask.
    """

    k: Array
    v: Array
    bias_KGTS: Array | None
    mask: Mask
    pairs: Pairs


class Rows(NamedTuple):
    """The softmax of each query over the keys that it has met so far.

    Attributes:
      largest: (blocks, B, K, G, C) score.
      total: of exp(score - largest).
      out: (blocks, B, K, G, C, H) sum of exp(score - largest) v.
    """

    largest: Array
    total: Array
    out: Array


def _scores(settings: Settings, q: Array, keys: Keys, t: Array, s: Array) -> tuple[Array, Array]:
    """Returns the scores of block t of the queries and block s of the keys.

    They are (B, K, G, C, C) fp32, -inf where masked; and the same before bias and mask.
    """
    size = settings.block
    raw = _dot("bkgth,bksh->bkgts", _at(q, t), _at(keys.k, s)) * settings.scale
    scores = raw = soft_cap(raw, settings.softcap)
    if keys.bias_KGTS is not None:
        starts = (0, 0, t * size, s * size)
        bias = jax.lax.dynamic_slice(keys.bias_KGTS, starts, (*raw.shape[1:3], size, size))
        scores = raw + bias.astype(jnp.float32)
    mask = keys.mask.part(t * size, size, s * size, size)
    return jnp.where(mask.allowed()[:, None, None], scores, -jnp.inf), raw


def _dot(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


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


def nothing_met(q: Array, v: Array, sink_KG: Array | None) -> Rows:
    """Returns the softmax of every query over no keys; a sink's weight is in its total."""
    largest = jnp.full(q.shape[:-1], -jnp.inf)
    total = jnp.zeros(q.shape[:-1])
    if sink_KG is not None:
        largest, total = jnp.broadcast_to(sink_KG[..., None], largest.shape), total + 1
    return Rows(largest, total, jnp.zeros((*q.shape[:-1], v.shape[-1])))


def meet(settings: Settings, rows: Rows, q: Array, keys: Keys) -> Rows:
    """Returns the softmax over the keys met before and these."""

    def add(t, s, rows):
        largest, total, out = (_at(x, t) for x in rows)
        scores, _ = _scores(settings, q, keys, t, s)
        new = jnp.maximum(largest, scores.max(axis=-1))
        # Where no key was seen yet there is nothing to scale, and -inf - -inf is NaN.
        safe = jnp.where(jnp.isneginf(new), 0.0, new)
        shrink = jnp.exp(largest - safe)
        weights = jnp.exp(scores - safe[..., None])
        more = _dot("bkgts,bksh->bkgth", weights.astype(keys.v.dtype), _at(keys.v, s))
        total = total * shrink + weights.sum(axis=-1)
        parts = (new, total, out * shrink[..., None] + more)
        return Rows(*(_put(x, part, t) for x, part in zip(rows, parts)))

    return _loop(settings, keys.pairs, add, rows)


def finish(rows: Rows, dtype: Any) -> tuple[Array, Array]:
    """Returns the (blocks, B, K, G, C, H) outputs, and what turns scores into weights again."""
    some = rows.total > 0
    total = jnp.where(some, rows.total, 1.0)
    # ln of the sum of exp(score); +inf makes all weights of a row without keys 0.
    normaliser = jnp.where(some, rows.largest + jnp.log(total), jnp.inf)
    return (rows.out / total[..., None]).astype(dtype), normaliser


class Back(NamedTuple):
    """What the backward pass knows of each query; of the layout of `Rows`.

    Attributes:
      q: queries.
      grad_out: of the outputs.
      mean: every score gets weight * (its own gradient - this).
      normaliser: as `finish` returns it.
    """

    q: Array
    grad_out: Array
    mean: Array
    normaliser: Array

    @classmethod
    def of(cls, q: Array, out: Array, normaliser: Array, grad_out: Array) -> "Back":
        mean = jnp.sum(grad_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        return cls(q, grad_out, mean, normaliser)

    def sink(self, sink_KG: Array | None) -> Array | None:
        """Returns the (K, G) gradient of the sinks, if there are any."""
        if sink_KG is None:
            return None
        lost = jnp.exp(sink_KG[..., None] - self.normaliser) * self.mean
        return -lost.sum(axis=(0, 1, 4))


class Gradients(NamedTuple):
    """Sums of gradients, fp32; those of keys and values as (blocks, B, K, H, C)."""

    q: Array
    k: Array
    v: Array
    bias_KGTS: Array | None

    @classmethod
    def zeros(cls, q: Array, keys: Keys) -> "Gradients":
        # Keys come last here: in the other order XLA's CPU backend takes 1.5 times as long.
        operands = (q, keys.k.mT, keys.v.mT, keys.bias_KGTS)
        return cls(*(None if x is None else jnp.zeros(x.shape, jnp.float32) for x in operands))


def meet_again(settings: Settings, grads: Gradients, back: Back, keys: Keys) -> Gradients:
    """Returns the gradients with what queries and these keys have from each other added."""

    def add(t, s, grads):
        scores, raw = _scores(settings, back.q, keys, t, s)
        weights = jnp.exp(scores - _at(back.normaliser, t)[..., None])
        rows_grad = _at(back.grad_out, t)
        more_v = _dot("bkgth,bkgts->bkhs", rows_grad, weights.astype(keys.v.dtype))
        own = _dot("bkgth,bksh->bkgts", rows_grad, _at(keys.v, s))
        grad = weights * (own - _at(back.mean, t)[..., None])
        grad_bias = grads.bias_KGTS
        if grad_bias is not None:
            starts = (0, 0, t * settings.block, s * settings.block)
            grad_bias = jax.lax.dynamic_update_slice(grad_bias, grad.sum(axis=0), starts)
        if settings.softcap is not None:
            grad *= soft_cap_slope(raw, settings.softcap)
        grad = (grad * settings.scale).astype(keys.k.dtype)
        more_q = _dot("bkgts,bksh->bkgth", grad, _at(keys.k, s))
        more_k = _dot("bkgth,bkgts->bkhs", _at(back.q, t), grad)
        return Gradients(
            _put(grads.q, _at(grads.q, t) + more_q, t),
            _put(grads.k, _at(grads.k, s) + more_k, s),
            _put(grads.v, _at(grads.v, s) + more_v, s),
            grad_bias,
        )

    return _loop(settings, keys.pairs, add, grads)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings: Settings, q: Array, keys: Keys, sink_KG: Array | None) -> Array:
    """Returns the (blocks, B, K, G, C, H) outputs."""
    return _forward(settings, q, keys, sink_KG)[0]


def _forward(settings: Settings, q: Array, keys: Keys, sink_KG: Array | None):
    """Returns the outputs, and what the backward pass needs."""
    rows = meet(settings, nothing_met(q, keys.v, sink_KG), q, keys)
    out, normaliser = finish(rows, keys.v.dtype)
    return out, (q, keys, sink_KG, out, normaliser)


def _backward(settings: Settings, saved, grad_out: Array):
    q, keys, sink_KG, out, normaliser = saved
    back = Back.of(q, out, normaliser, grad_out)
    grads = meet_again(settings, Gradients.zeros(q, keys), back, keys)
    grad_keys = Keys(
        grads.k.mT.astype(keys.k.dtype),
        grads.v.mT.astype(keys.v.dtype),
        None if grads.bias_KGTS is None else grads.bias_KGTS.astype(keys.bias_KGTS.dtype),
        *no_gradient((keys.mask, keys.pairs)),
    )
    return grads.q.astype(q.dtype), grad_keys, back.sink(sink_KG)


def no_gradient(tree: Any) -> Any:
    """Returns the gradients of whole numbers."""
    return jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), tree)


_flash.defvjp(_forward, _backward)
