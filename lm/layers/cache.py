"""What attention keeps between calls: the keys and values of the places so far.

Those of place p are in slot p mod S. A layer with a window of W has at most W slots, whatever the
length of the row: older keys are out of every later query's sight. One without a window has a slot
for as many places as a row may come to have; where places go on beyond that, each writes over the
oldest, which then must belong to a row that is done.

Keys and values are stored in the compute dtype, in another float dtype, or as int8 codes with an
fp32 scale for each place and head: largest absolute value / 127. The places of one head of one row
lie together, (M, S, H) with M = B K: so a query is multiplied with them as they lie, and XLA's CPU
backend writes a new key in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
State = dict[str, Array]


class Keys(NamedTuple):
    """Keys that queries may look at, with their values.

    Attributes:
      k_BSKH, v_BSKH: keys and values, in the compute dtype.
      index_S: the place of each in its row, which the mask compares with those of the queries.
        Of a window's cache they come in any order, and those of slots still empty are negative.
      all_slots: whether they lie as what is said of the row's places does, slot by slot.
    """

    k_BSKH: Array
    v_BSKH: Array
    index_S: Array | np.ndarray
    all_slots: bool = True

    def of(self, x_BP: Array | None) -> Array | None:
        """Returns (..., S) of what (..., P) says of place p in slot p mod P; 0 for empty slots."""
        if x_BP is None or self.all_slots:
            return x_BP
        taken = jnp.take(x_BP, self.index_S % x_BP.shape[-1], axis=-1)
        return jnp.where(self.index_S < 0, 0, taken)


def init(new: Keys, slots: int, window: int | None = None, dtype: str | None = None) -> State:
    """Returns a cache that holds the keys of a prompt.

    Args:
      new: the keys of places 0..T-1.
      slots: places that the row may come to have.
      window: of the layer, if it has one; the cache then has no more slots than that.
      dtype: 'int8' or the name of a float dtype to store them in; None is theirs.
    """
    if window is not None:
        slots = min(slots, window)

    def store(x_MT: Array) -> Array:
        excess = x_MT.shape[1] - slots
        if excess > 0:
            return jnp.roll(x_MT[:, excess:], excess % slots, axis=1)
        return jnp.pad(x_MT, ((0, 0), (0, -excess), *((0, 0),) * (x_MT.ndim - 2)))

    return {name: store(x) for name, x in _stored(new, dtype or str(new.k_BSKH.dtype)).items()}


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
    T, S, like = new.k_BSKH.shape[1], state["k"].shape[1], new.k_BSKH
    stored = _stored(new, str(state["k"].dtype))
    if window is None or T == 1:  # With a window, the key that is written over is out of sight.
        state = {name: write(state[name], x, slot) for name, x in stored.items()}
        return state, Keys(*read(state, like), places(slot + T, S), all_slots=window is None)
    # The first of several queries still sees keys that the last of them overwrites.
    old = Keys(*read(state, like), places(slot, S))
    seen = (jnp.concatenate(pair, axis=1) for pair in zip(old[:2], new[:2]))
    index_S = jnp.concatenate([old.index_S, new.index_S])
    first = max(0, T - S)
    state = {name: write(state[name], x[:, first:], slot + first) for name, x in stored.items()}
    return state, Keys(*seen, index_S, all_slots=False)


def read(state: State, like_BTKH: Array) -> tuple[Array, Array]:
    """Returns the (B, S, K, H) keys and values of all slots.

    Args:
      state: a cache.
      like_BTKH: any array with their rows, heads and dtype.
    """
    B, _, K, _ = like_BTKH.shape

    def decoded(name: str) -> Array:
        x_MSH = state[name]
        if x_MSH.dtype == jnp.int8:
            x_MSH = x_MSH.astype(jnp.float32) * state[f"{name}_scale"][..., None]
        x_BKSH = x_MSH.astype(like_BTKH.dtype).reshape(B, K, *x_MSH.shape[1:])
        return x_BKSH.swapaxes(1, 2)

    return decoded("k"), decoded("v")


def _stored(new: Keys, dtype: str) -> State:
    """Returns keys and values as a cache of a dtype has them."""
    state = {}
    for name, x_BTKH in (("k", new.k_BSKH), ("v", new.v_BSKH)):
        B, T, K, H = x_BTKH.shape
        x_MTH = x_BTKH.swapaxes(1, 2).reshape(B * K, T, H)
        if dtype == "int8":
            x_MTH = x_MTH.astype(jnp.float32)
            scale_MT = jnp.max(jnp.abs(x_MTH), axis=-1) / 127
            state[f"{name}_scale"] = scale_MT
            x_MTH = jnp.round(x_MTH / jnp.where(scale_MT == 0, 1.0, scale_MT)[..., None])
        state[name] = x_MTH.astype(dtype)
    return state


def write(x_BS: Array, new_BT: Array, slot: Array) -> Array:
    """Writes what is said of T places, T <= S, the first of which is `slot`, each to its slot."""
    T, S = new_BT.shape[1], x_BS.shape[1]
    if T == 1:
        return jax.lax.dynamic_update_slice_in_dim(x_BS, new_BT, slot % S, axis=1)
    return x_BS.at[:, (slot + jnp.arange(T)) % S].set(new_BT, unique_indices=True)


def places(count: Array, slots: int) -> Array:
    """Returns the newest place in each slot once `count` places are written; empty is negative."""
    last = count - 1
    return last - (last - jnp.arange(slots)) % slots
