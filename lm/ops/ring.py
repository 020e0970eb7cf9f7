"""Ring attention: keys and values go round the devices that share a row's places.

Each device keeps its own queries and meets the keys of every other in turn, while it sends on
those it has (Liu et al., 2023). The softmax is taken online, within a device as in `lm.ops.flash`
and over the ring; the backward pass goes round once more, the gradients of keys and values along
with them. No device ever holds more than the keys of two, and what a mask hides is not computed.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.core.mesh import PLACES_AXIS
from lm.ops.flash import (
    Back,
    Gradients,
    Keys,
    Rows,
    Settings,
    default_block,
    finish,
    from_blocks,
    in_blocks,
    meet,
    meet_again,
    no_gradient,
    nothing_met,
    pad_blocks,
    pad_mask,
    pairs_of,
)
from lm.ops.mask import Mask
from lm.ops.sequence import Layout, for_rows

Array = jax.Array


class Ring(NamedTuple):
    """What does not change from hop to hop; all static.

    Attributes:
      settings: of the scores.
      devices: that share a row's places.
      rounds: how many devices' keys each meets: fewer than all where a window hides the others.
    """

    settings: Settings
    devices: int
    rounds: int

    def home(self, hop: Array | int) -> Array:
        """Returns the number of the device whose keys are here after so many hops."""
        return (jax.lax.axis_index(PLACES_AXIS) - hop) % self.devices

    def send(self, tree, hops: int = 1):
        """Returns what the device `hops` before this one has."""
        pairs = [(device, (device + hops) % self.devices) for device in range(self.devices)]
        return jax.lax.ppermute(tree, PLACES_AXIS, pairs)


class Visitors(NamedTuple):
    """Keys on their way round, in blocks, with what masks know of them."""

    k: Array
    v: Array
    index_S: Array
    segments_BS: Array | None


def ring_attend(
    layout: Layout,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
    block: int | None = None,
) -> Array:
    """Returns what `lm.ops.attention.attend` does, under a mesh that divides places.

    A device holds the bias of its own queries on all keys.

    Args:
      layout: on that mesh.
      block: as of `lm.ops.flash.flash_attend`; the others as of `attend`.
    """
    N, H = q_BTNH.shape[2:]
    K = k_BSKH.shape[2]
    scale = H**-0.5 if scale is None else scale
    rounds = rounds_of(mask, layout.devices)

    def own(q_BTNH, k_BSKH, v_BSKH, mask, bias_NTS, sink_N):
        k_BSKH, v_BSKH = (layout.own_heads(x, N, K) for x in (k_BSKH, v_BSKH))
        (B, T, _, H), (S, K_own) = q_BTNH.shape, k_BSKH.shape[1:3]
        size = min(block or default_block(), max(T, S))
        ring = Ring(Settings(scale, softcap, size, None), layout.devices, rounds)
        q = in_blocks(q_BTNH.reshape(B, T, K_own, -1, H), size)
        k, v = in_blocks(k_BSKH, size), in_blocks(v_BSKH, size)
        heads = q.shape[2:4]
        bias = sink_KG = None
        if bias_NTS is not None:
            # By the device whose keys it is for.
            bias = jnp.moveaxis(bias_NTS.reshape(*heads, T, layout.devices, S), 3, 0)
            bias = pad_blocks(pad_blocks(bias, 3, size), 4, size)
        if sink_N is not None:
            sink_KG = sink_N.astype(jnp.float32).reshape(heads)
        out = _ring(ring, q, k, v, bias, sink_KG, pad_mask(mask, -T % size, -S % size))
        return from_blocks(out)[:, :T].reshape(B, T, -1, v.shape[-1])

    places, rows_places = PartitionSpec(PLACES_AXIS), PartitionSpec(layout.rows, PLACES_AXIS)
    of_mask = mask.replace(
        index_T=places,
        index_S=places,
        segments_BT=rows_places,
        segments_BS=rows_places,
        prefix_B=PartitionSpec(layout.rows),
    )
    heads = layout.heads
    of_options = PartitionSpec(heads, PLACES_AXIS), PartitionSpec(heads)
    specs = (layout.queries, *[layout.keys(K)] * 2, of_mask, *of_options)
    divided = jax.shard_map(
        own,
        in_specs=specs,
        out_specs=layout.queries,
        axis_names=set(layout.axes),
        check_vma=False,
    )
    mask = for_rows(mask, len(q_BTNH))
    return divided(q_BTNH, k_BSKH, v_BSKH, mask, bias_NTS, sink_N)


def rounds_of(mask: Mask, devices: int) -> int:
    """Returns how many devices' keys each device has to meet, its own first, by the places alone.

    Args:
      mask: of whole rows, its places known.
      devices: that share them.
    """
    reach = mask.reach(len(mask.index_T) // devices, len(mask.index_S) // devices)
    t_P, s_P = np.nonzero(np.asarray(reach))
    return 1 + int(((t_P - s_P) % devices).max(initial=0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, q, k, v, bias, sink_KG, mask: Mask) -> Array:
    """Returns the (blocks, B, K, G, C, H) outputs of this device's queries.

    Args:
      ring: static.
      q, k, v: in blocks, of this device.
      bias: (devices, K, G, T, S) of its queries on the keys of each, or None.
      sink_KG: or None.
      mask: of its queries and keys.
    """
    return _forward(ring, q, k, v, bias, sink_KG, mask)[0]


def _visit(ring: Ring, visitors: Visitors, bias, mask: Mask, hop: Array | int) -> Keys:
    """Returns the keys that are here after so many hops, as the queries meet them."""
    mask = mask.replace(index_S=visitors.index_S, segments_BS=visitors.segments_BS)
    if bias is not None:
        bias = jax.lax.dynamic_index_in_dim(bias, ring.home(hop), 0, keepdims=False)
    return Keys(visitors.k, visitors.v, bias, mask, pairs_of(mask, ring.settings.block))


def _forward(ring: Ring, q, k, v, bias, sink_KG, mask: Mask):
    def meet_visitors(rows: Rows, visitors: Visitors, hop: Array | int) -> Rows:
        return meet(ring.settings, rows, q, _visit(ring, visitors, bias, mask, hop))

    def step(carry, hop):
        rows, visitors = carry
        # Sent on before they are met, so that both can go on at once.
        following = ring.send(visitors)
        return (meet_visitors(rows, visitors, hop), following), None

    start = nothing_met(q, v, sink_KG), Visitors(k, v, mask.index_S, mask.segments_BS)
    hops = jnp.arange(ring.rounds - 1)
    (rows, visitors), _ = jax.lax.scan(step, start, hops)
    out, normaliser = finish(meet_visitors(rows, visitors, ring.rounds - 1), v.dtype)
    return out, (q, k, v, bias, sink_KG, mask, out, normaliser)


def _backward(ring: Ring, saved, grad_out: Array):
    q, k, v, bias, sink_KG, mask, out, normaliser = saved
    back = Back.of(q, out, normaliser, grad_out)

    def meet_visitors(grads: Gradients, visitors: Visitors, hop: Array | int) -> Gradients:
        keys = _visit(ring, visitors, bias, mask, hop)
        every = grads.bias_KGTS
        if every is not None:
            grads = grads._replace(bias_KGTS=jnp.zeros_like(every[0]))
        grads = meet_again(ring.settings, grads, back, keys)
        if every is not None:
            new, home = grads.bias_KGTS, ring.home(hop)
            every = jax.lax.dynamic_update_index_in_dim(every, new, home, 0)
        return grads._replace(bias_KGTS=every)

    def step(carry, hop):
        grads, visitors = carry
        following = ring.send(visitors)
        grads = meet_visitors(grads, visitors, hop)
        k, v = ring.send((grads.k, grads.v))
        return (grads._replace(k=k, v=v), following), None

    visitors = Visitors(k, v, mask.index_S, mask.segments_BS)
    grads = Gradients.zeros(q, Keys(k, v, bias, mask, pairs=None))
    hops = jnp.arange(ring.rounds - 1)
    (grads, visitors), _ = jax.lax.scan(step, (grads, visitors), hops)
    grads = meet_visitors(grads, visitors, ring.rounds - 1)
    # They belong to keys that have come so many hops.
    grad_k, grad_v = ring.send((grads.k.mT, grads.v.mT), 1 - ring.rounds)
    grad_bias = None if bias is None else grads.bias_KGTS.astype(bias.dtype)
    grads = grads.q.astype(q.dtype), grad_k.astype(k.dtype), grad_v.astype(v.dtype), grad_bias
    return *grads, back.sink(sink_KG), no_gradient(mask)


_ring.defvjp(_forward, _backward)
