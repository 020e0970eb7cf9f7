"""Dropout (Srivastava et al., 2014)."""

import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.part import Part


class Dropout(Part):
    """Zeroes each entry with probability `rate` and scales the others by 1 / (1 - rate).

    It draws from the rng named 'dropout', and does nothing where `ctx.deterministic`.
    """

    rate: float

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        if self.rate == 0.0 or ctx.deterministic:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / (1.0 - self.rate), 0.0).astype(x.dtype)
