"""Quantizers of kernels: 8 or 4 bits for a weight, and a scale for some of them together.

An int8 kernel has one scale for each output. Those of 4 bits have one for each group of neighbours
along the last input dimension, and two codes to a byte: int4 are integers from -8 to 7, nf4 the
16 levels of Dettmers et al. (2023), quantiles of a normal distribution.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp

Array = jax.Array

KINDS = ("int8", "int4", "nf4")
GROUP = 64
# Appendix E of Dettmers et al. (2023), https://arxiv.org/abs/2305.14314.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize(
    kernel: Array, kind: str, inputs: Sequence[int], group: int = GROUP
) -> tuple[Array, Array]:
    """Returns the codes and the scales of a kernel; each code stands for the nearest level.

    The scale is the largest absolute value of its weights over the largest level, which is half a
    step beyond the last integer for int8 and int4, so that no weight is off by more.

    Args:
      kernel: of any shape.
      kind: one of `KINDS`.
      inputs: the dimensions that a product sums over, in order.
      group: most weights that share a scale, where a weight has 4 bits: the groups are as large as
        the last input dimension divides into evenly.

    Returns:
      int8 codes of the kernel's shape, or uint8 ones with half of the last input dimension, whose
      low four bits are the first of two neighbours. fp32 scales of the kernel's shape with 1 in
      place of all inputs (int8), or the number of groups in place of the last one.

    Raises:
      ValueError: for another kind, or an odd number of inputs where two codes go to a byte.
    """
    check_kind(kind)
    kernel, axis = kernel.astype(jnp.float32), inputs[-1]
    if kind == "int8":
        largest = jnp.max(jnp.abs(kernel), axis=tuple(inputs), keepdims=True)
        scales = _nonzero(largest / 127.5)
        return jnp.clip(jnp.round(kernel / scales), -128, 127).astype(jnp.int8), scales
    front, size, back = kernel.shape[:axis], kernel.shape[axis], kernel.shape[axis + 1 :]
    most = group_size(size, group)
    groups = kernel.reshape(*front, size // most, most, *back)
    largest = jnp.max(jnp.abs(groups), axis=axis + 1)
    scales = _nonzero(largest if kind == "nf4" else largest / 7.5)
    scaled = kernel / _repeat(scales, size, axis)
    if kind == "nf4":
        # One comparison for each boundary, which takes no memory beside the kernel's own.
        codes = sum((scaled > (a + b) / 2).astype(jnp.uint8) for a, b in pairwise(NF4))
    else:
        codes = (jnp.clip(jnp.round(scaled), -8, 7) + 8).astype(jnp.uint8)
    pairs = jnp.asarray(codes).reshape(*front, size // 2, 2, *back)
    low, high = jnp.take(pairs, 0, axis + 1), jnp.take(pairs, 1, axis + 1)
    return low | (high << 4), scales


def dequantize(codes: Array, scales: Array, kind: str, axis: int) -> Array:
    """Returns the fp32 kernel that codes and scales stand for: level times scale.

    Args:
      codes, scales: as `quantize` returns them.
      kind: one of `KINDS`.
      axis: the last input dimension.
    """
    if kind == "int8":
        return codes.astype(jnp.float32) * scales
    pairs = jnp.stack([codes & 15, codes >> 4], axis + 1)
    shape = unpacked_shape(codes.shape, kind, axis)
    codes = pairs.reshape(shape)
    if kind == "nf4":
        # Choices by bit would be as fast, but XLA makes kernels of their constants, 16 a shape.
        levels = jnp.array(NF4, jnp.float32).at[codes].get(mode="promise_in_bounds")
    else:
        levels = codes.astype(jnp.float32) - 8
    return levels * _repeat(scales, shape[axis], axis)


def check_kind(kind: str) -> None:
    """Raises a ValueError for what is none of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"a kernel is quantized as one of {', '.join(KINDS)}, not {kind!r}")


def unpacked_shape(shape: Sequence[int], kind: str, axis: int) -> tuple[int, ...]:
    """Returns the shape of a kernel from that of its codes."""
    factor = 1 if kind == "int8" else 2
    return (*shape[:axis], factor * shape[axis], *shape[axis + 1 :])


def group_size(size: int, most: int = GROUP) -> int:
    """Returns the largest even number up to `most` that divides `size`.

    Raises:
      ValueError: if `size` is odd.
    """
    if size % 2:
        raise ValueError(
            f"a kernel of 4 bits has an even number of inputs, two to a byte, not {size}: keep it "
            "as it is, or quantize it as int8"
        )
    return max(n for n in range(2, most + 1, 2) if size % n == 0)


def _nonzero(scales: Array) -> Array:
    """Returns 1 in place of the scales of weights that are all zero, or nearly."""
    tiny = math.sqrt(jnp.finfo(jnp.float32).tiny)
    return jnp.where(scales < tiny, 1.0, scales)


def _repeat(scales: Array, size: int, axis: int) -> Array:
    """Returns scales as long as the kernel along `axis`."""
    return jnp.repeat(scales, size // scales.shape[axis], axis)
