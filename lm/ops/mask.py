"""The one language of attention masks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array


@struct.dataclass
class Mask:
    """Which keys each query may see: all conditions that are given must hold.

    Attributes:
      index_T, index_S: place of each query and key in the row, which `causal` and `window`
        compare. Numpy arrays where they are known before a program runs, so that it can be laid out
        for them.
      segments_BT, segments_BS: documents of queries and keys; a query sees keys of its own
        document only, and none in segment 0, which is padding. None: one document.
      prefix_B: how many of the first places of each row `causal` does not hide (a prefix language
        model; Liu et al., 2018), or None.
      causal: a query sees keys at its own place and before.
      window: a query sees only the `window` nearest such keys, itself included (Mistral's
        sliding window, Jiang et al., 2023).
    """

    index_T: Array | np.ndarray
    index_S: Array | np.ndarray
    segments_BT: Array | None = None
    segments_BS: Array | None = None
    prefix_B: Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)

    def allowed(self) -> Array:
        """Returns (B or 1, T, S) booleans, True where a query may see a key."""
        index_T, index_S = jnp.asarray(self.index_T), jnp.asarray(self.index_S)
        distance_TS = index_T[:, None] - index_S[None, :]
        allowed_BTS = jnp.ones_like(distance_TS, bool)[None]
        if self.causal:
            allowed_BTS &= distance_TS >= 0
            if self.prefix_B is not None:
                allowed_BTS |= (index_S < self.prefix_B[:, None])[:, None, :]
        if self.window is not None:
            allowed_BTS &= jnp.abs(distance_TS) < self.window
        if self.segments_BS is not None:
            allowed_BTS &= (self.segments_BS != 0)[:, None, :]
            if self.segments_BT is not None:
                allowed_BTS &= self.segments_BT[:, :, None] == self.segments_BS[:, None, :]
        return allowed_BTS

    def is_known(self) -> bool:
        """Returns whether the places are values already while a program is still being traced."""
        return not any(isinstance(x, jax.core.Tracer) for x in (self.index_T, self.index_S))

    def is_plain(self) -> bool:
        """Returns whether queries and keys are known to be the places from 0 on, in order."""
        return self.is_known() and all(
            np.array_equal(index, np.arange(len(index))) for index in (self.index_T, self.index_S)
        )

    def reach(self, block: int, keys: int | None = None) -> Array | np.ndarray:
        """Returns which blocks of queries can see any key of which blocks, by their places alone.

        Segments and prefixes do not count: they are divided over devices, and this must be the same
        on all.

        Args:
          block: queries, and keys, of a block; both lengths are multiples of it.
          keys: of a block, if they are not as many as queries.

        Returns:
          (T / block, S / keys) booleans, of numpy where the places are known.
        """
        xp = np if self.is_known() else jnp
        blocks_T = xp.reshape(self.index_T, (-1, block))
        blocks_S = xp.reshape(self.index_S, (-1, keys or block))
        nearest = blocks_T.min(axis=1)[:, None] - blocks_S.max(axis=1)  # Of the keys before all.
        furthest = blocks_T.max(axis=1)[:, None] - blocks_S.min(axis=1)
        reach = xp.ones(nearest.shape, bool)
        if self.causal and self.prefix_B is None:
            reach &= furthest >= 0
        if self.window is not None:
            reach &= (nearest < self.window) & (furthest > -self.window)
        return reach

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
