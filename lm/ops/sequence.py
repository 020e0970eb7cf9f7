"""Attention over rows whose places several devices share: how its operands lie on the mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.core.mesh import BATCH_AXES, PLACES_AXIS, RULES, automatic_axes, check_places
from lm.ops.mask import Mask

Array = jax.Array


class Layout(NamedTuple):
    """How queries, keys and values lie on the mesh that is traced for.

    Attributes:
      axes: name -> devices of all axes that the compiler has.
      rows: those that divide the rows of a batch, if any.
      heads: the one that divides the heads, or None.
    """

    axes: dict[str, int]
    rows: tuple[str, ...] | None
    heads: str | None

    @property
    def devices(self) -> int:
        """Over how many devices the places of a row are divided."""
        return self.axes[PLACES_AXIS]

    @property
    def head_parts(self) -> int:
        """Over how many devices the heads are divided before attention."""
        return 1 if self.heads is None else self.axes[self.heads]

    @property
    def queries(self) -> PartitionSpec:
        return PartitionSpec(self.rows, PLACES_AXIS, self.heads)

    def keys(self, num_heads: int) -> PartitionSpec:
        """Returns how K key heads lie: whole on every device where the mesh does not divide them.

        `own_heads` then takes from them what a device needs.
        """
        divided = num_heads % self.head_parts == 0
        return PartitionSpec(self.rows, PLACES_AXIS, self.heads if divided else None)

    def check(self, q_BTNH: Array, k_BSKH: Array, mask: Mask) -> None:
        """Raises a ValueError if the mesh does not divide this, or it reads from a cache."""
        (B, T, N), (S, K) = q_BTNH.shape[:3], k_BSKH.shape[1:3]
        for length in (T, S):
            check_places(length, sequence=self.devices)
        rows, parts = 1, self.head_parts
        for axis in self.rows or ():
            rows *= self.axes[axis]
        if B % rows or N % parts:
            raise ValueError(
                f"{rows} devices do not divide {B} rows, or {parts} not {N} heads: choose another "
                "mesh"
            )
        if K % parts and (N // K) % (N // parts):
            raise ValueError(
                f"{N} query heads over {parts} devices would take several of {K} key heads each, "
                f"which {parts} does not divide: choose a smaller {self.heads} axis"
            )
        if not mask.is_known():
            raise ValueError(
                f"rows whose places {self.devices} devices share are read whole, and these keys "
                "are of a cache: generate without a mesh, or with sequence=1"
            )

    def own_heads(self, x_BSKH: Array, num_queries: int, num_heads: int) -> Array:
        """Returns the key heads that this device's query heads look at.

        Args:
          x_BSKH: laid out as `keys` says, within a `jax.shard_map`.
          num_queries, num_heads: N and K, of all devices.
        """
        if num_heads % self.head_parts == 0:
            return x_BSKH
        own = num_queries // self.head_parts
        first = jax.lax.axis_index(self.heads) * own // (num_queries // num_heads)
        return jax.lax.dynamic_slice_in_dim(x_BSKH, first, 1, axis=2)


def lay_out() -> Layout | None:
    """Returns how attention lies on the mesh that is traced for; None if places are not divided."""
    axes = automatic_axes()
    if axes.get(PLACES_AXIS, 1) == 1:
        return None
    heads = RULES["heads"] if RULES["heads"] in axes else None
    # One device divides nothing; but gradients would be summed over an axis that is not named.
    alone = [axis for axis, size in axes.items() if size == 1 and axis != heads]
    rows = [axis for axis in axes if axis in BATCH_AXES or axis in alone]
    return Layout(axes, tuple(rows) or None, heads)


def for_rows(mask: Mask, num_rows: int) -> Mask:
    """Returns a mask whose documents are given for each row, also where all rows have the same."""

    def every(segments: Array | None) -> Array | None:
        if segments is None:
            return None
        return jnp.broadcast_to(segments, (num_rows, segments.shape[1]))

    return mask.replace(segments_BT=every(mask.segments_BT), segments_BS=every(mask.segments_BS))
