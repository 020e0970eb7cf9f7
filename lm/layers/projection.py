"""Weight matrices: every product of an activation with a kernel goes through `contract`."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.init import ZEROS, Init, VarianceScaling
from lm.core.part import Part

Array = jax.Array


def contract(x: Array, kernel: Array, num_in: int = 1) -> Array:
    """Contracts the last `num_in` dimensions of `x` with the first `num_in` of `kernel`.

    Operands of a lower precision are multiplied as they are and summed in fp32, forwards and
    backwards; the result has their dtype.
    """
    matrix = kernel.reshape(math.prod(kernel.shape[:num_in]), -1)
    flat = x.reshape(*x.shape[: x.ndim - num_in], matrix.shape[0])
    product = flat @ matrix if x.dtype == jnp.float32 else _low_precision(flat, matrix)
    return product.reshape(*product.shape[:-1], *kernel.shape[num_in:])


@jax.custom_vjp
def _low_precision(x: Array, matrix: Array) -> Array:
    """x @ matrix with fp32 sums.

    Plainly differentiated, the fp32 cotangent would make both backward products fp32 ones, and
    XLA's CPU backend would also widen the operands of a product that returns bfloat16.
    """
    return _dot(x, matrix, ((x.ndim - 1,), (0,)))


def _dot(a: Array, b: Array, dims: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32).astype(
        a.dtype
    )


def _forward(x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return _low_precision(x, matrix), (x, matrix)


def _backward(saved: tuple[Array, Array], y: Array) -> tuple[Array, Array]:
    x, matrix = saved
    rows = tuple(range(x.ndim - 1))
    return _dot(y, matrix, ((y.ndim - 1,), (1,))), _dot(x, y, (rows, rows))


_low_precision.defvjp(_forward, _backward)


class Projection(Part):
    """y = x kernel + bias, over one or several input and output dimensions.

    Attributes:
      features: output dimensions, such as (num_heads, head_dim).
      axes: logical axis of every kernel dimension, inputs first.
      num_in: how many of the last dimensions of `x` are contracted.
      bias: whether there is a bias of shape `features`.
      kernel_init, bias_init: initializers.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    num_in: int = 1
    bias: bool = False
    kernel_init: Init = VarianceScaling()
    bias_init: Init = ZEROS

    @nn.compact
    def __call__(self, x: Array, ctx: Context) -> Array:
        """Returns (..., *features) in the compute dtype of `ctx`."""
        shape = x.shape[x.ndim - self.num_in :] + self.features
        fan_in = math.prod(shape[: self.num_in])
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            shape,
            jnp.float32,
            fan_in,
        )
        y = contract(x.astype(ctx.dtype), kernel.astype(ctx.dtype), self.num_in)
        if self.bias:
            axes = self.axes[self.num_in :]
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(self.bias_init, axes),
                self.features,
                jnp.float32,
                fan_in,
            )
            y += bias.astype(ctx.dtype)
        return y
