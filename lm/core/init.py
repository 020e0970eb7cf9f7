"""Initializers as values: they compare, hash and print, so a model that holds them does too.

Each is called with a key, a shape, a dtype and the number of inputs that one output sums over.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Normal:
    """Draws from N(0, std^2)."""

    std: float = 0.02

    def __call__(self, key, shape, dtype=jnp.float32, fan_in: int = 1):
        return self.std * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Draws from U(low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __call__(self, key, shape, dtype=jnp.float32, fan_in: int = 1):
        return jax.random.uniform(key, shape, dtype, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Fills with one value."""

    value: float = 0.0

    def __call__(self, key, shape, dtype=jnp.float32, fan_in: int = 1):
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class VarianceScaling:
    """Draws with variance `scale / fan`.

    `VarianceScaling(1 / 3, "in", "uniform")` is torch's default for the weights and biases of
    `Linear`, and `VarianceScaling(1, "average", "uniform")` is Xavier's (Glorot and Bengio, 2010).

    Attributes:
      scale: variance times fan.
      fan: 'in', 'out' or 'average' of the two.
      distribution: 'normal' or 'uniform'.
    """

    scale: float = 1.0
    fan: str = "in"
    distribution: str = "normal"

    def __call__(self, key, shape, dtype=jnp.float32, fan_in: int = 1):
        fan_out = math.prod(shape) / fan_in
        fan = {"in": fan_in, "out": fan_out, "average": (fan_in + fan_out) / 2}[self.fan]
        variance = self.scale / fan
        if self.distribution == "normal":
            return math.sqrt(variance) * jax.random.normal(key, shape, dtype)
        bound = math.sqrt(3 * variance)
        return jax.random.uniform(key, shape, dtype, -bound, bound)


Init = Callable[..., jax.Array]
ZEROS = Constant(0.0)
ONES = Constant(1.0)
