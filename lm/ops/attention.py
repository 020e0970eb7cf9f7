"""Scaled dot-product attention (Vaswani et al., 2017) and the one language of its masks."""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Mask:
    """Which keys each query may see: all conditions that are given must hold.

    Attributes:
      index_T, index_S: place of each query and key in the row, which `causal` and `window`
        compare. In decoding they are slots of the cache.
      segments_BT, segments_BS: documents of queries and keys; a query sees keys of its own
        document only, and none in segment 0, which is padding. None: one document.
      causal: a query sees keys at its own place and before.
      window: a query sees only the `window` nearest such keys, itself included (Mistral's
        sliding window, Jiang et al., 2023).
    """

    index_T: Array
    index_S: Array
    segments_BT: Array | None = None
    segments_BS: Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)

    def allowed(self) -> Array:
        """Returns (B or 1, T, S) booleans, True where a query may see a key."""
        distance_TS = self.index_T[:, None] - self.index_S[None, :]
        allowed_TS = jnp.ones_like(distance_TS, bool)
        if self.causal:
            allowed_TS &= distance_TS >= 0
        if self.window is not None:
            allowed_TS &= jnp.abs(distance_TS) < self.window
        allowed_BTS = allowed_TS[None]
        if self.segments_BS is not None:
            allowed_BTS &= (self.segments_BS != 0)[:, None, :]
            if self.segments_BT is not None:
                allowed_BTS &= self.segments_BT[:, :, None] == self.segments_BS[:, None, :]
        return allowed_BTS


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
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
      softcap: squashes scores to cap * tanh(score / cap) (Gemma 2), if given.

    Returns:
      (B, T, N, H) in the dtype of `v_BSKH`.
    """
    B, T, N, _ = q_BTNH.shape
    weights_BKGTS, total_BKGT = _unnormalised(
        q_BTNH, k_BSKH, mask, bias_NTS=bias_NTS, scale=scale, softcap=softcap
    )
    out_BKGTH = jnp.einsum(
        "bkgts,bskh->bkgth",
        weights_BKGTS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    # Dividing the sums by the total costs one pass over (T, H) instead of one over (T, S).
    out_BKGTH /= total_BKGT[..., None]
    out_BTKGH = jnp.moveaxis(out_BKGTH, 3, 1).astype(v_BSKH.dtype)
    return out_BTKGH.reshape(B, T, N, v_BSKH.shape[-1])


def attention_weights(q_BTNH: Array, k_BSKH: Array, mask: Mask, **options) -> Array:
    """Returns the (B, N, T, S) fp32 weights of `attend`: rows sum to 1, masked entries are 0."""
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
) -> tuple[Array, Array]:
    """Returns exp(score - largest score), exactly 0 where masked, and its sum over the keys."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    assert N % K == 0, f"{N} query heads do not group over {K} key heads"
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS *= H**-0.5 if scale is None else scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if bias_NTS is not None:
        scores_BKGTS += bias_NTS.reshape(K, N // K, T, S).astype(jnp.float32)
    allowed_BTS = mask.allowed()
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    largest_BKGT = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1))
    # A row without keys has no largest score: 0 in its place makes its weights 0, not NaN.
    largest_BKGT = jnp.where(jnp.isneginf(largest_BKGT), 0.0, largest_BKGT)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT[..., None])
    total_BKGT = weights_BKGTS.sum(axis=-1)
    return weights_BKGTS, jnp.where(total_BKGT == 0, 1.0, total_BKGT)
