"""The one language of attention masks."""

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
      prefix_B: how many of the first places of each row `causal` does not hide (a prefix language
        model; Liu et al., 2018), or None.
      causal: a query sees keys at its own place and before.
      window: a query sees only the `window` nearest such keys, itself included (Mistral's
        sliding window, Jiang et al., 2023).
    """

    index_T: Array
    index_S: Array
    segments_BT: Array | None = None
    segments_BS: Array | None = None
    prefix_B: Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)

    def allowed(self) -> Array:
        """Returns (B or 1, T, S) booleans, True where a query may see a key."""
        distance_TS = self.index_T[:, None] - self.index_S[None, :]
        allowed_BTS = jnp.ones_like(distance_TS, bool)[None]
        if self.causal:
            allowed_BTS &= distance_TS >= 0
            if self.prefix_B is not None:
                allowed_BTS |= (self.index_S < self.prefix_B[:, None])[:, None, :]
        if self.window is not None:
            allowed_BTS &= jnp.abs(distance_TS) < self.window
        if self.segments_BS is not None:
            allowed_BTS &= (self.segments_BS != 0)[:, None, :]
            if self.segments_BT is not None:
                allowed_BTS &= self.segments_BT[:, :, None] == self.segments_BS[:, None, :]
        return allowed_BTS

    def reaches(self) -> Array:
        """Returns a () boolean: False where no query can see any key, by their places alone.

        Segments do not count: they are divided over devices, and this must be the same on all.
        """
        nearest = self.index_T.min() - self.index_S.max()  # Of the keys before every query.
        furthest = self.index_T.max() - self.index_S.min()
        reaches = jnp.ones((), bool)
        if self.causal and self.prefix_B is None:
            reaches &= furthest >= 0
        if self.window is not None:
            reaches &= (nearest < self.window) & (furthest > -self.window)
        return reaches

    def part(self, t: Array, num_t: int, s: Array, num_s: int) -> "Mask":
        """Returns the mask of `num_t` queries from place t on and `num_s` keys from place s on."""

        def cut(a: Array | None, start: Array, size: int) -> Array | None:
            return None if a is None else jax.lax.dynamic_slice_in_dim(a, start, size, axis=-1)

        return self.replace(
            index_T=cut(self.index_T, t, num_t),
            index_S=cut(self.index_S, s, num_s),
            segments_BT=cut(self.segments_BT, t, num_t),
            segments_BS=cut(self.segments_BS, s, num_s),
        )
