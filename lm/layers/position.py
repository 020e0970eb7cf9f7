"""Positions: tables added to the embedding, and T5's bias on the scores of attention."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.core.init import Init, Normal
from lm.core.part import Part

Array = jax.Array


class LearnedPositions(Part):
    """A trained vector for each of `length` positions (Devlin et al., 2019)."""

    length: int
    table_init: Init = Normal(0.02)

    @nn.compact
    def __call__(self, positions_BT: Array, features: int) -> Array:
        """Returns (B, T, D) fp32."""
        init = nn.with_logical_partitioning(self.table_init, ("position", "embed"))
        return self.param("table", init, (self.length, features))[positions_BT]


class SinusoidalPositions(Part):
    """sin and cos of position / 10000^(2i/D) (Vaswani et al., 2017).

    Attributes:
      length: positions up to here are accepted, None for any; the table itself has no end.
      interleaved: sin and cos alternate, as in the paper; otherwise all sines come first, as in
        its own code and in Marian. The two differ by a permutation of features.
    """

    length: int | None = None
    interleaved: bool = False

    def __call__(self, positions_BT: Array, features: int) -> Array:
        """Returns (B, T, D) fp32; D must be even."""
        frequencies = 10000.0 ** (-np.arange(0, features, 2) / features)
        angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        waves = (jnp.sin(angles), jnp.cos(angles))
        if self.interleaved:
            return jnp.stack(waves, axis=-1).reshape(*positions_BT.shape, features)
        return jnp.concatenate(waves, axis=-1)


class RelativeBias(Part):
    """T5's bias: a trained scalar per head and bucket of distance (Raffel et al., 2020).

    Half of the buckets hold single distances, the other half grow logarithmically up to
    `max_distance`; with `bidirectional`, each direction gets half of the buckets.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    table_init: Init = Normal(1.0)

    @nn.compact
    def __call__(self, index_T: Array, index_S: Array) -> Array:
        """Returns the (N, T, S) fp32 bias for places `index_T` of queries, `index_S` of keys."""
        init = nn.with_logical_partitioning(self.table_init, ("buckets", "heads"))
        table = self.param("table", init, (self.num_buckets, self.num_heads))
        distance_TS = index_S[None, :] - index_T[:, None]
        return jnp.moveaxis(table[self.buckets(distance_TS)], -1, 0)

    def buckets(self, distance: Array) -> Array:
        """Maps key place minus query place to the number of its bucket."""
        count, first = self.num_buckets, 0
        if self.bidirectional:
            count //= 2
            first = jnp.where(distance > 0, count, 0)
            distance = jnp.abs(distance)
        else:
            distance = jnp.maximum(-distance, 0)
        exact = count // 2
        ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
        steps = jnp.log(ratio) / math.log(self.max_distance / exact) * (count - exact)
        far = jnp.minimum(exact + steps.astype(jnp.int32), count - 1)
        return first + jnp.where(distance < exact, distance, far)
