"""Scaled dot-product attention (Vaswani et al., 2017), by any of its backends."""

import jax
import jax.numpy as jnp

from lm.ops.flash import flash_attend
from lm.ops.mask import Mask
from lm.ops.product import product

Array = jax.Array


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Returns softmax(scale * q k^T + bias) v over the keys that the mask allows.

    N query heads share K key heads in groups of N / K (grouped-query attention, Ainslie et al.,
    2023); the keys are never repeated. Scores and softmax are fp32 whatever the inputs. A query
    that may see no key gets zeros.

    Args:
      q_BTNH: queries.
      k_BSKH: keys; N must be a multiple of K.
      v_BSKH: values.
      mask: which keys each query may see.
      bias_NTS: added to the scaled scores, such as T5's relative bias.
      scale: 1 / sqrt(H) if None.
      softcap: squashes scaled scores to cap * tanh(score / cap) (Gemma 2), if given.
      sink_N: a score of each head for no key at all, which takes weight and gives nothing (Xiao et
        al., 2024), or None.
      backend: 'reference' holds the scores of all places, 'flash' a block of them (`lm.ops.flash`);
        'auto' is what `choose` chooses.

    Returns:
      (B, T, N, H) in the dtype of `v_BSKH`.

    Raises:
      ValueError: for another backend.
    """
    options = dict(bias_NTS=bias_NTS, scale=scale, softcap=softcap, sink_N=sink_N)
    backend = choose(backend, q_BTNH.shape[1])
    return BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, mask, **options)


def reference_attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask, **options) -> Array:
    """Returns what `attend` does, with the scores of all places at once; arguments as there."""
    B, T, N, _ = q_BTNH.shape
    weights_BKGTS, total_BKGT = _unnormalised(q_BTNH, k_BSKH, mask, **options)
    out_BKGTH = product("bkgts,bskh->bkgth", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    # Dividing the sums by the total costs one pass over (T, H) instead of one over (T, S).
    out_BKGTH /= total_BKGT[..., None]
    out_BTKGH = jnp.moveaxis(out_BKGTH, 3, 1).astype(v_BSKH.dtype)
    return out_BTKGH.reshape(B, T, N, v_BSKH.shape[-1])


def attention_weights(q_BTNH: Array, k_BSKH: Array, mask: Mask, **options) -> Array:
    """Returns the (B, N, T, S) fp32 weights of `attend`: rows sum to 1 with the sink's weight."""
    weights_BKGTS, total_BKGT = _unnormalised(q_BTNH, k_BSKH, mask, **options)
    weights_BKGTS /= total_BKGT[..., None]
    return weights_BKGTS.reshape(q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], k_BSKH.shape[1])


def _unnormalised(
    q_BTNH: Array,
    k_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
) -> tuple[Array, Array]:
    """Returns exp(score - largest score), exactly 0 where masked, and its sum with the sink's."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    assert N % K == 0, f"{N} query heads do not group over {K} key heads"
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = product("btkgh,bskh->bkgts", q_BTKGH, k_BSKH)
    scores_BKGTS *= H**-0.5 if scale is None else scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if bias_NTS is not None:
        scores_BKGTS += bias_NTS.reshape(K, N // K, T, S).astype(jnp.float32)
    allowed_BTS = mask.allowed()
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    largest_BKGT = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1))
    if sink_N is not None:
        sink_KG1 = sink_N.astype(jnp.float32).reshape(K, N // K, 1)
        largest_BKGT = jnp.maximum(largest_BKGT, jax.lax.stop_gradient(sink_KG1))
    # A row without keys has no largest score: 0 in its place makes its weights 0, not NaN.
    largest_BKGT = jnp.where(jnp.isneginf(largest_BKGT), 0.0, largest_BKGT)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT[..., None])
    total_BKGT = weights_BKGTS.sum(axis=-1)
    if sink_N is not None:
        total_BKGT += jnp.exp(sink_KG1 - largest_BKGT)
    return weights_BKGTS, jnp.where(total_BKGT == 0, 1.0, total_BKGT)


BACKENDS = {"reference": reference_attend, "flash": flash_attend}


def choose(backend: str, length: int) -> str:
    """Returns the backend for `length` queries, which 'auto' leaves open.

    'flash' is faster from 256 places on: on two CPU cores, forwards and backwards with heads of 64,
    1.3 times at 256 and 512, 2 times at 1,024, 2.7 times at 2,048.

    Raises:
      ValueError: for an unknown backend.
    """
    names = ["auto", *BACKENDS]
    if backend not in names:
        raise ValueError(f"an attention backend is one of {', '.join(names)}, not {backend!r}")
    if backend != "auto":
        return backend
    return "flash" if length >= FLASH_LENGTH else "reference"


FLASH_LENGTH = 256
