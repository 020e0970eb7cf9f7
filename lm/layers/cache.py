"""What attention keeps between calls: the keys and values of the places so far."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
State = dict[str, Array]


class Keys(NamedTuple):
    """Keys that queries may look at, with their values.

    Attributes:
      k_BSKH, v_BSKH: keys and values, in the compute dtype.
      index_S: the place of each in its row, which the mask compares with those of the queries.
    """

    k_BSKH: Array
    v_BSKH: Array
    index_S: Array


def init(new: Keys, slots: int) -> State:
    """Returns a cache of `slots` slots, the first of which hold the keys of a prompt."""
    room = ((0, 0), (0, slots - new.k_BSKH.shape[1]), (0, 0), (0, 0))
    return {"k": jnp.pad(new.k_BSKH, room), "v": jnp.pad(new.v_BSKH, room)}


def extend(state: State, new: Keys, slot: Array) -> tuple[State, Keys]:
    """Writes the keys of new tokens.

    Args:
      state: of `init`, or of this.
      new: the tokens' keys.
      slot: () int32, the slot of the first of them.

    Returns:
      The new state, and the keys that the new tokens may look at, themselves included.
    """
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    state = {"k": write(state["k"], new.k_BSKH), "v": write(state["v"], new.v_BSKH)}
    k_BSKH, v_BSKH = read(state)
    return state, Keys(k_BSKH, v_BSKH, jnp.arange(k_BSKH.shape[1]))


def read(state: State) -> tuple[Array, Array]:
    """Returns the (B, S, K, H) keys and values of all slots, in the compute dtype."""
    return state["k"], state["v"]
