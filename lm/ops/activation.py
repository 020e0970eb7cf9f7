"""Activations that keep only what they read; the backward pass computes everything else again.

Plainly differentiated, GELU keeps its argument, the tanh and its result, each as wide as a
feed-forward layer, and SwiGLU keeps five such arrays. Computing them again costs less than reading
them from memory. XLA computes once what is the same forwards and backwards, and so keeps the
result: therefore each activation is written in two ways that are equal.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Of the argument of GELU's tanh (Hendrycks and Gimpel, 2016).
INSIDE, CUBIC = math.sqrt(2 / math.pi), 0.044715


class Activation(NamedTuple):
    """A function of fp32 numbers.

    Attributes:
      value: the function.
      value_and_slope: the same again, in another form, and its derivative.
    """

    value: Callable[[Array], Array]
    value_and_slope: Callable[[Array], tuple[Array, Array]]


def _gelu_again(x: Array) -> tuple[Array, Array]:
    below = 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))
    return x * below, below + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_again(x: Array) -> tuple[Array, Array]:
    below, slope = jax.nn.sigmoid(2 * _inside(x)), INSIDE * (1 + 3 * CUBIC * x * x)
    return x * below, below + 2 * x * below * (1 - below) * slope


def _inside(x: Array) -> Array:
    return INSIDE * (x + CUBIC * x * x * x)


def _silu_again(x: Array) -> tuple[Array, Array]:
    sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def _relu_again(x: Array) -> tuple[Array, Array]:
    return jnp.where(x > 0, x, 0.0), (x > 0).astype(x.dtype)


def _tanh_again(x: Array) -> tuple[Array, Array]:
    tanh = 2 * jax.nn.sigmoid(2 * x) - 1
    return tanh, 1 - tanh * tanh


# 'gelu' is the exact one, through erf.
FUNCTIONS = {
    "gelu": Activation(partial(jax.nn.gelu, approximate=False), _gelu_again),
    "gelu_tanh": Activation(partial(jax.nn.gelu, approximate=True), _gelu_tanh_again),
    "relu": Activation(jax.nn.relu, _relu_again),
    "silu": Activation(jax.nn.silu, _silu_again),
    "tanh": Activation(jnp.tanh, _tanh_again),
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(name: str, x: Array, times: Array | None = None) -> Array:
    """Returns f(x), or f(x) * times, in the dtype of x, computed in fp32.

    Args:
      name: of f, in `FUNCTIONS`.
      x: of any shape.
      times: of the same shape and dtype, or None.
    """
    value = FUNCTIONS[name].value(x.astype(jnp.float32))
    return (value if times is None else value * times).astype(x.dtype)


def _forward(name: str, x: Array, times: Array | None):
    return activate(name, x, times), (x, times)


def _backward(name: str, saved: tuple[Array, Array | None], grad: Array):
    x, times = saved
    grad = grad.astype(jnp.float32)
    value, slope = FUNCTIONS[name].value_and_slope(x.astype(jnp.float32))
    if times is None:
        return (grad * slope).astype(x.dtype), None
    return (grad * slope * times).astype(x.dtype), (grad * value).astype(times.dtype)


activate.defvjp(_forward, _backward)
