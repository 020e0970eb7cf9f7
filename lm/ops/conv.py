"""Causal depthwise convolution over places, as in Mamba, with a tail carried between calls."""

import jax
import jax.numpy as jnp

Array = jax.Array


def causal_conv(x_BTF: Array, kernel_FK: Array, segments_BT: Array | None = None) -> Array:
    """Returns y_t = sum_k kernel_k x_{t-K+1+k} for each feature, over places of t's own document.

    Args:
      x_BTF: (B, T, F) inputs.
      kernel_FK: (F, K); the last column meets the place itself.
      segments_BT: (B, T) document of each place, or None for a single one.

    Returns:
      (B, T, F) in the wider of the two dtypes.
    """
    before = kernel_FK.shape[1] - 1
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT, ((0, 0), (before, 0)))
    return _conv(jnp.pad(x_BTF, ((0, 0), (before, 0), (0, 0))), kernel_FK, segments_BT)


def continue_conv(
    x_BTF: Array, kernel_FK: Array, segments_BT: Array, tail_BKF: Array, before_B: Array
) -> tuple[Array, Array]:
    """As `causal_conv`, after the last K-1 inputs of an earlier call.

    Padding counts for nothing wherever it stands: it is neither convolved nor kept in the tail.

    Args:
      x_BTF: (B, T, F) inputs.
      kernel_FK: (F, K).
      segments_BT: (B, T) document of each place, 0 for padding.
      tail_BKF: (B, K-1, F) inputs of the newest places before; zeros where there are none.
      before_B: (B,) the document that the tail belongs to.

    Returns:
      (B, T, F) outputs and the new tail.
    """
    before, length = tail_BKF.shape[1], x_BTF.shape[1]
    segments = jnp.concatenate([jnp.repeat(before_B[:, None], before, 1), segments_BT], axis=1)
    joined = jnp.concatenate([tail_BKF, x_BTF], axis=1)
    if length == 1:
        y_BTF = _conv(joined, kernel_FK, segments)
        valid_B = segments_BT != 0
        kept_BKF = jnp.where(segments[:, 1:, None] == segments[:, -1:, None], joined[:, 1:], 0)
        return y_BTF, jnp.where(valid_B[..., None], kept_BKF, tail_BKF)
    # With all padding moved to the front, a window never has padding between its places.
    order = jnp.argsort(segments != 0, axis=1, stable=True)
    segments = jnp.take_along_axis(segments, order, axis=1)
    joined = jnp.take_along_axis(joined, order[..., None], axis=1)
    y = jnp.pad(_conv(joined, kernel_FK, segments), ((0, 0), (before, 0), (0, 0)))
    y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[..., None], axis=1)
    same = segments[:, length:, None] == segments[:, -1:, None]
    return y[:, before:], jnp.where(same, joined[:, length:], 0)


def _conv(x: Array, kernel_FK: Array, segments: Array | None) -> Array:
    """Convolves without padding: the output is K - 1 places shorter."""
    width = kernel_FK.shape[1]
    length = x.shape[1] - width + 1
    y_BTF = x[:, width - 1 :] * kernel_FK[:, -1]
    for k in range(width - 1):
        shifted = x[:, k : k + length]
        if segments is not None:
            same = segments[:, k : k + length] == segments[:, width - 1 :]
            shifted = jnp.where(same[..., None], shifted, 0)
        y_BTF += shifted * kernel_FK[:, k]
    return y_BTF
