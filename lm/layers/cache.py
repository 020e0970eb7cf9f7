"""What attention keeps between calls: the keys and values of the places so far.

A layer without a window keeps all of them. One with a window of W keeps the newest W, those of
place p in slot p mod W, whatever the length of the row: older ones are out of every later
query's sight.
"""

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
        Of a window's cache they come in any order, and those of slots still empty are negative.
      all_places: whether they are the places 0..S-1, in order.
    """

    k_BSKH: Array
    v_BSKH: Array
    index_S: Array
    all_places: bool = True

    def of(self, x_BP: Array | None) -> Array | None:
        """Returns (..., S) of what (..., P) says of every place of the row; 0 for empty slots."""
        if x_BP is None or self.all_places:
            return x_BP
        return jnp.where(self.index_S < 0, 0, jnp.take(x_BP, self.index_S, axis=-1, mode="clip"))


def init(new: Keys, slots: int, window: int | None = None) -> State:
    """Returns a cache that holds the keys of a prompt.

    Args:
      new: the keys of places 0..T-1.
      slots: places that the row may come to have.
      window: of the layer, if it has one; the cache then has no more slots than that.
    """
    if window is not None:
        slots = min(slots, window)

    def store(x_BTKH: Array) -> Array:
        excess = x_BTKH.shape[1] - slots
        if excess > 0:
            return jnp.roll(x_BTKH[:, excess:], excess % slots, axis=1)
        return jnp.pad(x_BTKH, ((0, 0), (0, -excess), (0, 0), (0, 0)))

    return {"k": store(new.k_BSKH), "v": store(new.v_BSKH)}


def extend(state: State, new: Keys, slot: Array, window: int | None = None) -> tuple[State, Keys]:
    """Writes the keys of new tokens.

    Args:
      state: of `init`, or of this.
      new: the tokens' keys.
      slot: () int32, the place of the first of them.
      window: as of `init`.

    Returns:
      The new state, and the keys that the new tokens may look at, themselves included.
    """
    T, S = new.k_BSKH.shape[1], state["k"].shape[1]
    if window is None:
        state = _write(state, new, slot)
        return state, Keys(*read(state), jnp.arange(S))
    if T == 1:  # The key that it overwrites is just out of sight.
        state = _write(state, new, slot % S)
        return state, Keys(*read(state), _places(slot + 1, S), all_places=False)
    # The first of several queries still sees keys that the last of them overwrites.
    old = Keys(*read(state), _places(slot, S))
    seen = (jnp.concatenate(pair, axis=1) for pair in zip(old[:2], new[:2]))
    index_S = jnp.concatenate([old.index_S, new.index_S])
    kept = Keys(new.k_BSKH[:, -S:], new.v_BSKH[:, -S:], new.index_S[-S:])
    state = _write_each(state, kept, kept.index_S % S)
    return state, Keys(*seen, index_S, all_places=False)


def read(state: State) -> tuple[Array, Array]:
    """Returns the (B, S, K, H) keys and values of all slots, in the compute dtype."""
    return state["k"], state["v"]


def _write(state: State, new: Keys, slot: Array) -> State:
    """Returns the state with new keys in the slots from one on."""
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    return {"k": write(state["k"], new.k_BSKH), "v": write(state["v"], new.v_BSKH)}


def _write_each(state: State, new: Keys, slots_T: Array) -> State:
    """Returns the state with each of the new keys in a slot of its own."""

    def write(x_BSKH: Array, new_BTKH: Array) -> Array:
        return x_BSKH.at[:, slots_T].set(new_BTKH, unique_indices=True)

    return {"k": write(state["k"], new.k_BSKH), "v": write(state["v"], new.v_BSKH)}


def _places(count: Array, slots: int) -> Array:
    """Returns the newest place in each slot once `count` places are written; empty is negative."""
    last = count - 1
    return last - (last - jnp.arange(slots)) % slots
