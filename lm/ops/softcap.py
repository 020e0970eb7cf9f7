"""A smooth limit on the size of scores and logits."""

import jax
import jax.numpy as jnp

Array = jax.Array


def soft_cap(x: Array, cap: float | None) -> Array:
    """Returns cap * tanh(x / cap), which lies between -cap and cap (Gemma 2; Riviere et al., 2024).

    It does so strictly: where tanh rounds to 1, the result is the number just below the cap.

    Args:
      x: floats of any shape.
      cap: above 0; None changes nothing.
    """
    if cap is None:
        return x
    return cap * (1 - float(jnp.finfo(x.dtype).epsneg)) * jnp.tanh(x / cap)


def soft_cap_slope(capped: Array, cap: float) -> Array:
    """Returns the derivative of `soft_cap` from its result, 1 - (result / cap)^2."""
    return 1 - (capped / cap) ** 2
