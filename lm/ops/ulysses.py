"""DeepSpeed-Ulysses: heads instead of places, for as long as attention takes.

Devices that share a row's places exchange them for whole rows of some of the heads, compute
ordinary attention on those, and exchange them back (Jacobs et al., 2023). Each of the four
exchanges is one all-to-all, in which a device sends and gets (B, T / n, N, H) numbers on n
devices: as many, where the length grows with the devices.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.core.mesh import PLACES_AXIS
from lm.ops.mask import Mask
from lm.ops.sequence import Layout, for_rows

Array = jax.Array
exchange = partial(jax.lax.all_to_all, axis_name=PLACES_AXIS, tiled=True)


def ulysses_attend(
    layout: Layout,
    attend: Callable[..., Array],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    sink_N: Array | None = None,
    **options,
) -> Array:
    """Returns what `lm.ops.attention.attend` does, under a mesh that divides places.

    Key heads that the devices do not divide are repeated, so often that they do, before they are
    exchanged.

    Args:
      layout: on that mesh.
      attend: ordinary attention, of the following arguments.
      options: of it; the others as of `lm.ops.attention.attend`.

    Raises:
      ValueError: if the devices do not divide the query heads.
    """
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    devices, parts = layout.devices, layout.head_parts
    if N % (parts * devices):
        of_heads = f"{layout.heads}={parts} times " if parts > 1 else ""
        raise ValueError(
            f"Ulysses exchanges places for whole heads, and {of_heads}{PLACES_AXIS}={devices} "
            f"devices do not divide {N} heads: choose train.context_parallel 'ring', or a smaller "
            f"{PLACES_AXIS}"
        )

    def own(q_BTNH, k_BSKH, v_BSKH, mask, bias_NTS, sink_N):
        def heads_of(x_BSKH: Array) -> Array:
            x_BSKH = layout.own_heads(x_BSKH, N, K)
            times = devices // math.gcd(x_BSKH.shape[2], devices)
            return exchange(jnp.repeat(x_BSKH, times, axis=2), split_axis=2, concat_axis=1)

        q_BTNH = exchange(q_BTNH, split_axis=2, concat_axis=1)
        # Known places stay known: what is compiled is laid out for them.
        mask = mask.replace(index_T=index_T, index_S=index_S)
        given = dict(bias_NTS=bias_NTS, sink_N=sink_N, **options)
        out_BTNH = attend(q_BTNH, heads_of(k_BSKH), heads_of(v_BSKH), mask, **given)
        return exchange(out_BTNH, split_axis=1, concat_axis=2)

    index_T, index_S = mask.index_T, mask.index_S
    rows = PartitionSpec(layout.rows)
    heads = PartitionSpec((*([layout.heads] if layout.heads else []), PLACES_AXIS))
    specs = (layout.queries, *[layout.keys(K)] * 2, rows, heads, heads)
    divided = jax.shard_map(
        own,
        in_specs=specs,
        out_specs=layout.queries,
        axis_names=set(layout.axes),
        check_vma=False,
    )
    mask = for_rows(mask.replace(index_T=None, index_S=None), len(q_BTNH))
    return divided(q_BTNH, k_BSKH, v_BSKH, mask, bias_NTS, sink_N)
