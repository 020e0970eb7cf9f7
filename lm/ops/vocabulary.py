"""Embedding and cross entropy with the vocabulary divided over devices, whatever its size.

Each device has ceil(V / P) rows of the table, and sees all places (Shoeybi et al., 2019). With the
stages of a pipeline among those devices, none has more to compute than the others (Yeung et al.,
2024).
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.ops.loss import CrossEntropy
from lm.ops.product import product

Array = jax.Array
Axes = tuple[str, ...]


def pad_vocabulary(table_VD: Array, parts: int) -> Array:
    """Returns the table with zero rows at its end, (parts * ceil(V / parts), D)."""
    return jnp.pad(table_VD, ((0, -len(table_VD) % parts), (0, 0)))


def divided_embed(table_VD: Array, tokens_BT: Array, axes: Axes) -> Array:
    """Returns the (B, T, D) rows of the tokens, the table's rows lying on axes of the current mesh.

    Args:
      table_VD: as `pad_vocabulary` returns it for as many parts as those axes have devices.
      tokens_BT: the same on all of them.
      axes: names of the axes.
    """

    def look_up(table_VD: Array, first_1: Array, tokens_BT: Array) -> Array:
        own_BT = tokens_BT - first_1
        here_BT = (own_BT >= 0) & (own_BT < len(table_VD))
        found_BTD = table_VD[jnp.where(here_BT, own_BT, 0)]
        return jax.lax.psum(jnp.where(here_BT[..., None], found_BTD, 0), axes)

    return _divided(look_up, table_VD, axes)(tokens_BT)


def divided_cross_entropy(
    x_BTD: Array,
    table_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    vocab_size: int,
    axes: Axes,
) -> CrossEntropy:
    """Returns `lm.ops.loss.cross_entropy` of x table^T, of which each device has its columns alone.

    What devices exchange is (B, T) numbers: the largest logit, the sum of exponentials and the
    target's logit; and backwards the gradient of `x_BTD`.

    Args:
      x_BTD, targets_BT, weights_BT: the same on all devices of `axes`.
      table_VD, axes: as of `divided_embed`.
      vocab_size: V without padding, which takes no probability.
    """

    def nll(table_VD: Array, first_1: Array, x_BTD: Array, targets_BT: Array):
        # Its gradient is the sum of what the devices' columns give.
        x_BTD = jax.lax.pcast(x_BTD, axes, to="varying")
        ids_V = first_1 + jnp.arange(len(table_VD))
        logits_BTV = product("btd,vd->btv", x_BTD, table_VD)
        logits_BTV = jnp.where(ids_V < vocab_size, logits_BTV, -jnp.inf)
        largest_BT = jax.lax.pmax(jax.lax.stop_gradient(logits_BTV).max(axis=-1), axes)
        total_BT = jnp.exp(logits_BTV - largest_BT[..., None]).sum(axis=-1)
        z_BT = largest_BT + jnp.log(jax.lax.psum(total_BT, axes))
        own_BTV = jnp.where(ids_V == targets_BT[..., None], logits_BTV, 0)
        target_BT = jax.lax.psum(own_BTV.sum(axis=-1), axes)
        before_BTV = (logits_BTV == target_BT[..., None]) & (ids_V < targets_BT[..., None])
        beaten_BT = ((logits_BTV > target_BT[..., None]) | before_BTV).any(axis=-1)
        return z_BT - target_BT, jax.lax.psum(beaten_BT.astype(jnp.int32), axes) == 0

    nll_BT, correct_BT = _divided(nll, table_VD, axes)(x_BTD, targets_BT)
    weights_BT = jax.lax.stop_gradient(weights_BT)
    loss = (weights_BT * nll_BT).sum()
    return CrossEntropy(
        loss=loss,
        nll=jax.lax.stop_gradient(loss),
        correct=(weights_BT * correct_BT).sum(),
        weight=weights_BT.sum(),
    )


def _divided(function, table_VD: Array, axes: Axes):
    """Returns `function` of each device's rows of the table and the number of the first of them."""
    shape = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(shape[axis] for axis in axes)
    first_P = jnp.arange(parts) * (len(table_VD) // parts)
    rows, whole = PartitionSpec(axes), PartitionSpec()

    def call(*operands: Array):
        specs = (rows, rows, *[whole] * len(operands))
        divided = jax.shard_map(function, in_specs=specs, out_specs=whole, axis_names=set(axes))
        return divided(table_VD, first_P, *operands)

    return call
