"""Tokens to their experts and back, on one device or over the `expert` axis of a mesh.

Under a mesh (`jax.sharding.use_abstract_mesh`) each device has its own tokens and its own experts.
It gathers its tokens in the order of their experts, sends them to the devices that hold those by
one all-to-all, and gets the outputs back by another (Lepikhin et al., 2021). Nothing here has
tokens x experts x places entries: places are found by sorting, and rows are gathered.

Dimensions as in `lm.ops.routing`, and R counts rows: tokens laid out for experts, those of one
expert together.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lm.core.mesh import BATCH_AXES
from lm.ops.product import product
from lm.ops.routing import Routes, expert_choice

Array = jax.Array
EXPERT = "expert"

# What the experts are: of their parameters, (R, D) rows, and the rows of each expert, (E,) int32,
# or None where all have R / E; it returns (R, ...). Both products of a layer are
# `grouped_product`s. Rows beyond those of all experts hold nothing, and what comes of them is
# nowhere used.
Experts = Callable[[Any, Array, Array | None], Array]


def grouped_product(x_RD: Array, kernel_EDF: Array, counts_E: Array | None = None) -> Array:
    """Returns each row times the kernel of its expert, in fp32.

    Args:
      x_RD: rows, those of one expert together, in the order of the experts.
      kernel_EDF: of the same dtype.
      counts_E: rows of each expert, or None for R / E each, which needs no ragged product: XLA's
        CPU backend makes that from E whole ones.
    """
    if counts_E is not None:
        return jax.lax.ragged_dot(x_RD, kernel_EDF, counts_E, preferred_element_type=jnp.float32)
    x_ECD = x_RD.reshape(len(kernel_EDF), -1, x_RD.shape[1])
    return product("ecd,edf->ecf", x_ECD, kernel_EDF).reshape(len(x_RD), -1)


def through_experts(
    experts: Experts,
    params: Any,
    x_TD: Array,
    routes: Routes,
    *,
    capacity_factor: float | None = None,
    groups: int = 1,
    mask_T: Array | None = None,
) -> tuple[Array, Array]:
    """Returns sum_k weight_tk expert_tk(x_t) for each token, and how many choices were dropped.

    With a capacity each expert has ceil(factor K / E times the tokens) places in each group of
    consecutive tokens, and a choice that finds none adds nothing. All first choices come before
    all second ones, and of those earlier tokens before later ones (Lepikhin et al., 2021). The
    groups decide what is dropped: the same number of them gives the same on every mesh. Without
    a capacity nothing is dropped. Over the devices of an `expert` axis that costs room for the
    worst case, where all tokens go to one device.

    Args:
      experts: see `Experts`; it is called once on each device, with the parameters there.
      params: arrays with a first dimension of E.
      x_TD: tokens, any dtype; T divides over the groups, and over the devices of a mesh.
      routes: of `lm.ops.routing.route`.
      capacity_factor: room for how many times the mean number of tokens, or None.
      groups: in how many parts tokens are counted; without a capacity it changes nothing.
      mask_T: False for padding, which goes nowhere, and gets zeros; or None.

    Returns:
      (T, D) in the dtype of the experts' output, and () int32.

    Raises:
      ValueError: if tokens, groups or experts do not divide over the devices, or the tokens over
        the groups.
    """
    E, num_devices = len(jax.tree.leaves(params)[0]), _axis_size(EXPERT)
    K = routes.experts_TK.shape[1]
    places = None
    if capacity_factor is not None:
        places = capacity(len(x_TD), groups, E, K, capacity_factor)
        groups = _own_groups(groups)

    def own(params, x_TD, experts_TK, weights_TK, mask_T):
        if mask_T is not None:
            experts_TK = jnp.where(mask_T[:, None], experts_TK, E)
        # Choices in the order in which they find their places.
        experts_KT = experts_TK.T
        if places is not None:
            slots = _fixed_slots(experts_KT, E, groups, places)
            rows_GECD = _to_rows(x_TD, *slots).reshape(groups, E, places, -1)
            y_RD = _by_places(experts, params, rows_GECD, num_devices)
        else:
            slots, counts_E = _free_slots(experts_KT, E, num_devices)
            y_RD = _by_counts(experts, params, _to_rows(x_TD, *slots), counts_E, num_devices)
        y_KTD = _from_rows(y_RD, *slots)
        out_TD = jnp.einsum("tk,ktd->td", weights_TK, y_KTD, preferred_element_type=jnp.float32)
        dropped = jnp.sum((slots.slot_KT == len(y_RD)) & (experts_KT < E), dtype=jnp.int32)
        return out_TD.astype(y_RD.dtype), dropped

    return _divided(own, E, params, x_TD, *routes, mask_T)


def through_choosing_experts(
    experts: Experts,
    params: Any,
    x_TD: Array,
    logits_TE: Array,
    *,
    capacity_factor: float,
    groups: int = 1,
    mask_T: Array | None = None,
) -> Array:
    """Returns, for each token, the weighted sum of the experts that chose it (Zhou et al., 2022).

    Each expert chooses ceil(factor / E times the tokens) of each group of consecutive tokens, so
    that a token has as many experts as the factor says in the mean.

    Args and errors as of `through_experts`, and
      logits_TE: of the router; see `lm.ops.routing.expert_choice`.
    """
    E, num_devices = logits_TE.shape[1], _axis_size(EXPERT)
    places = capacity(len(x_TD), groups, E, 1, capacity_factor)
    groups = _own_groups(groups)

    def own(params, x_TD, logits_TE, mask_T):
        def split(leaf: Array) -> Array:
            return leaf.reshape(groups, -1, *leaf.shape[1:])

        choose = partial(expert_choice, capacity=places)
        masks = None if mask_T is None else split(mask_T)
        tokens_GEC, weights_GEC = jax.vmap(choose)(split(logits_TE), mask_T=masks)
        tokens_GEC += jnp.arange(groups)[:, None, None] * (len(x_TD) // groups)
        y_RD = _by_places(experts, params, x_TD[tokens_GEC], num_devices)
        y_RD = y_RD * weights_GEC.reshape(-1, 1)
        out_TD = jnp.zeros((len(x_TD), y_RD.shape[1]), jnp.float32)
        return out_TD.at[tokens_GEC.reshape(-1)].add(y_RD), jnp.zeros((), jnp.int32)

    out_TD, _ = _divided(own, E, params, x_TD, logits_TE, mask_T)
    return out_TD.astype(x_TD.dtype)


def capacity(num_tokens: int, groups: int, num_experts: int, k: int, factor: float) -> int:
    """Returns the places of an expert in a group; ValueError if tokens do not divide over groups.

    It is ceil(factor k T / (groups E)), and no more than a group has tokens: none has one expert
    twice.
    """
    if groups < 1 or num_tokens % groups:
        raise ValueError(
            f"{num_tokens} tokens do not divide over {groups} groups: choose a number that does"
        )
    tokens = num_tokens // groups
    # A little less, so that a factor of 1.1 over 10 experts of 100 tokens is 11 and not 12.
    return max(1, min(tokens, math.ceil(factor * k * tokens / num_experts - 1e-9)))


# --- where each choice lies ------------------------------------------------------------------


class Slots(NamedTuple):
    """Which row each choice takes, and, in reverse, which choice each row is taken by.

    Attributes:
      slot_KT: int32 row of the k-th choice of each token; R where it has none.
      source_R: int32, k T + t of the choice; K T where there is none.
    """

    slot_KT: Array
    source_R: Array


def _fixed_slots(experts_KT: Array, E: int, groups: int, places: int) -> Slots:
    """Returns rows in the order (group, expert, place); E is no expert."""
    T = experts_KT.shape[1]
    group_T = jnp.arange(T) // (T // groups)
    keys_KT = jnp.where(experts_KT < E, group_T * E + experts_KT, groups * E)
    order_KT, starts = _sort(keys_KT, groups * E)
    place_KT = order_KT - starts[keys_KT]
    num_rows = groups * E * places
    fits_KT = (keys_KT < groups * E) & (place_KT < places)
    return _slots(jnp.where(fits_KT, keys_KT * places + place_KT, num_rows), num_rows)


def _free_slots(experts_KT: Array, E: int, num_devices: int) -> tuple[Slots, Array]:
    """Returns rows in the order (device, expert), and how many each expert has of them.

    The rows for one device are as many as could go there: a token goes to no expert twice.
    """
    K, T = experts_KT.shape
    own = E // num_devices
    order_KT, starts = _sort(experts_KT, E)
    per_device = T * min(K, own)
    device_KT = experts_KT // own
    slot_KT = order_KT - starts[device_KT * own] + device_KT * per_device
    num_rows = num_devices * per_device
    slot_KT = jnp.where(experts_KT < E, slot_KT, num_rows)
    return _slots(slot_KT, num_rows), jnp.diff(starts)


def _sort(keys: Array, num_keys: int) -> tuple[Array, Array]:
    """Returns each key's place in sorted order, equal ones as they come, and where each begins.

    Args:
      keys: int32 in 0..num_keys, of any shape.

    Returns:
      Their shape, and (num_keys + 1,): the last is the number of keys below `num_keys`.
    """
    keys_A = keys.reshape(-1)
    order_A = jnp.argsort(keys_A, stable=True)
    index_A = jnp.arange(keys_A.size, dtype=jnp.int32)
    rank_A = jnp.zeros_like(index_A).at[order_A].set(index_A, unique_indices=True)
    ends = jnp.cumsum(jnp.zeros(num_keys, jnp.int32).at[keys_A].add(1, mode="drop"))
    return rank_A.reshape(keys.shape), jnp.pad(ends, (1, 0))


def _slots(slot_KT: Array, num_rows: int) -> Slots:
    choices = jnp.arange(slot_KT.size, dtype=jnp.int32)
    source_R = jnp.full(num_rows, slot_KT.size, jnp.int32)
    return Slots(slot_KT, source_R.at[slot_KT.reshape(-1)].set(choices, mode="drop"))


# --- tokens to rows and back: both are gathers, and so are both their gradients --------------


@jax.custom_vjp
def _to_rows(x_TD: Array, slot_KT: Array, source_R: Array) -> Array:
    """Returns (R, D), in each row the token whose choice it is, or zeros."""
    token_R = jnp.where(source_R < slot_KT.size, source_R % len(x_TD), len(x_TD))
    return _take(x_TD, token_R)


@jax.custom_vjp
def _from_rows(y_RD: Array, slot_KT: Array, source_R: Array) -> Array:
    """Returns (K, T, D), the row of each choice, or zeros where it was dropped."""
    return _take(y_RD, slot_KT)


def _take(x_RD: Array, index: Array) -> Array:
    return x_RD.at[index].get(mode="fill", fill_value=0)


_to_rows.defvjp(
    lambda x_TD, slot_KT, source_R: (_to_rows(x_TD, slot_KT, source_R), slot_KT),
    lambda slot_KT, grad_RD: (_take(grad_RD, slot_KT).sum(0), None, None),
)
_from_rows.defvjp(
    lambda y_RD, slot_KT, source_R: (_from_rows(y_RD, slot_KT, source_R), source_R),
    lambda source_R, grad_KTD: (
        _take(grad_KTD.reshape(-1, grad_KTD.shape[-1]), source_R),
        None,
        None,
    ),
)


# --- rows through the experts, wherever those are --------------------------------------------


def _by_places(experts: Experts, params: Any, rows_GECD: Array, num_devices: int) -> Array:
    """Returns the outputs (G E C, D) of rows in which every expert has the same room."""
    G, E, C, _ = rows_GECD.shape
    rows = rows_GECD.swapaxes(0, 1).reshape(num_devices, E // num_devices, G * C, -1)
    # What comes is (device it is from, own expert, ...), and goes back in the same order.
    rows = _exchange(rows, num_devices).swapaxes(0, 1)
    y = experts(params, rows.reshape(-1, rows.shape[-1]), None)
    y = _exchange(y.reshape(*rows.shape[:3], -1).swapaxes(0, 1), num_devices)
    return y.reshape(E, G, C, -1).swapaxes(0, 1).reshape(G * E * C, -1)


def _by_counts(
    experts: Experts, params: Any, rows_RD: Array, counts_E: Array, num_devices: int
) -> Array:
    """Returns the outputs (R, D) of rows of which every expert has its own number."""
    if num_devices == 1:
        return experts(params, rows_RD, counts_E)
    rows = _exchange(rows_RD.reshape(num_devices, -1, rows_RD.shape[1]), num_devices)
    # Of each device that sends, how many of its rows are for each expert here.
    counts_XE = _exchange(counts_E.reshape(num_devices, -1), num_devices)
    ends_XE = jnp.cumsum(counts_XE, axis=1)
    index_R = jnp.arange(rows.shape[1])
    expert_XR = jnp.sum(index_R[:, None] >= ends_XE[:, None], axis=-1)
    rank_XR, _ = _sort(expert_XR, counts_XE.shape[1])
    slots = _slots(rank_XR.reshape(1, -1), rank_XR.size)
    y_RD = experts(params, _to_rows(rows.reshape(rank_XR.size, -1), *slots), counts_XE.sum(0))
    y = _from_rows(y_RD, *slots).reshape(*rows.shape[:2], -1)
    return _exchange(y, num_devices).reshape(len(rows_RD), -1)


def _exchange(x: Array, num_devices: int) -> Array:
    """Sends x[i] to device i of the expert axis; returns what each device sent, in their order."""
    return x if num_devices == 1 else jax.lax.all_to_all(x, EXPERT, 0, 0)


# --- devices ---------------------------------------------------------------------------------


def _token_axes() -> tuple[str, ...]:
    """Returns the axes of the mesh that tokens are divided over, () without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return ()
    return tuple(dict.fromkeys((*BATCH_AXES, EXPERT)))


def _axis_size(*axes: str) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in _token_axes())


def _own_groups(groups: int) -> int:
    """Returns the groups of each device; ValueError if they do not divide."""
    num_shards = _axis_size(*_token_axes())
    if groups % num_shards:
        raise ValueError(
            f"a capacity is counted in groups of tokens, and {groups} groups do not divide over "
            f"the {num_shards} devices that hold tokens: choose a multiple of {num_shards}, on "
            "every mesh the same"
        )
    return groups // num_shards


def _divided(own: Callable, num_experts: int, params: Any, *tokens: Any) -> tuple[Array, Array]:
    """Returns what `own` does, with each device's tokens and experts; its second output is summed.

    Other axes of the mesh stay with the compiler.
    """
    axes = _token_axes()
    if not axes:
        return own(params, *tokens)
    num_shards, num_devices = _axis_size(*axes), _axis_size(EXPERT)
    if num_experts % num_devices:
        raise ValueError(
            f"{num_experts} experts do not divide over {EXPERT}={num_devices} devices: choose "
            "another mesh"
        )
    if len(tokens[0]) % num_shards:
        raise ValueError(
            f"{len(tokens[0])} tokens do not divide over the {num_shards} devices of "
            f"{', '.join(axes)}: choose another batch size or mesh"
        )

    def summed(*args):
        out_TD, count = own(*args)
        return out_TD, jax.lax.psum(count, axes)

    rows = PartitionSpec(axes)
    return jax.shard_map(
        summed,
        in_specs=(PartitionSpec(EXPERT), *[rows] * len(tokens)),
        out_specs=(rows, PartitionSpec()),
        axis_names=set(axes),
        # `product` has a backward pass of its own, which knows nothing of what varies over what.
        check_vma=False,
    )(params, *tokens)
