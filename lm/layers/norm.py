"""Normalisation over the last dimension; statistics are fp32 whatever the input."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.init import ONES, ZEROS
from lm.core.part import Part
from lm.ops.sums import spread

Array = jax.Array


class LayerNorm(Part):
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al., 2016).

    Attributes:
      eps: added to the variance; 1e-5 is torch's default.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dim = x.shape[-1:]
        scale: Any = self.param("scale", nn.with_logical_partitioning(ONES, ("norm",)), dim)
        bias: Any = self.param("bias", nn.with_logical_partitioning(ZEROS, ("norm",)), dim)
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        return (normed * spread(scale, x32) + spread(bias, x32)).astype(x.dtype)


class RMSNorm(Part):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019).

    Attributes:
      eps: added to the mean square.
    """

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale: Any = self.param(
            "scale", nn.with_logical_partitioning(ONES, ("norm",)), x.shape[-1:]
        )
        x32 = x.astype(jnp.float32)
        mean_square = jnp.square(x32).mean(-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * spread(scale, x32)).astype(x.dtype)
