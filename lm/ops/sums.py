"""Sums over rows and columns, which XLA's CPU backend adds up one number after the other.

There they are products with ones, which are several times as fast; elsewhere plain sums.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lm.core.mesh import target_platform

Array = jax.Array

# The fast products of that backend begin at so many rows; one would be added up as before.
ONES = 8


def spread(vector: Array, like: Array) -> Array:
    """Returns `vector` for every row of `like`, in its dtype; the gradient is summed in fp32.

    Args:
      vector: (...), the last dimensions of `like`, such as a bias.
      like: (rows..., ...).
    """
    return _spread(like.shape, like.dtype.name, vector)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(shape: tuple[int, ...], dtype: str, vector: Array) -> Array:
    return jnp.broadcast_to(vector.astype(dtype), shape)


def _forward(shape: tuple[int, ...], dtype: str, vector: Array) -> tuple[Array, Array]:
    return _spread(shape, dtype, vector), jnp.empty_like(vector, shape=(0, *vector.shape))


def _backward(shape: tuple[int, ...], dtype: str, like: Array, grad: Array) -> tuple[Array]:
    return (column_sums(grad, like.ndim - 1).astype(like.dtype),)


_spread.defvjp(_forward, _backward)


def column_sums(x: Array, num_last: int = 1) -> Array:
    """Returns the fp32 sums over all but the last `num_last` dimensions."""
    rows = tuple(range(x.ndim - num_last))
    if target_platform() != "cpu":
        return x.sum(rows, dtype=jnp.float32)
    letters = "abcdefgh"[: len(rows)]
    ones = jnp.ones((ONES, *x.shape[: len(rows)]), x.dtype)
    return jnp.einsum(
        f"z{letters},{letters}...->z...", ones, x, preferred_element_type=jnp.float32
    )[0]
