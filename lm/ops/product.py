"""Products of activations and kernels, forwards and backwards, as each backend does them best."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.mesh import target_platform

Array = jax.Array


def product(letters: str, a: Array, b: Array) -> Array:
    """Returns `jnp.einsum(letters, a, b)`, summed and returned in fp32 whatever the operands.

    Plainly differentiated, the fp32 cotangent of operands of lower precision would make both
    backward products fp32 ones. Here it is rounded to their precision, as any activation is, and
    all three products multiply what is low and sum in fp32.

    Args:
      letters: as of einsum, 'bti,io->bto' for instance; every letter stands in two of the three at
        least, and in none twice.
      a, b: operands of one dtype.
    """
    return _product(letters, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(letters: str, a: Array, b: Array) -> Array:
    inputs, _, of_out = letters.partition("->")
    of_a, _, of_b = inputs.partition(",")
    if _is_few_rows_by_a_table(of_a, of_b, of_out, a, b):
        summed, rows = of_a[-1], of_a[:-1]
        a = jax.lax.optimization_barrier(jnp.moveaxis(a, -1, 0))
        out = jnp.einsum(f"{of_b},{summed}{rows}->{of_b[:-1]}{rows}", b, a)
        return jnp.moveaxis(jax.lax.optimization_barrier(out), 0, -1)
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _is_few_rows_by_a_table(of_a: str, of_b: str, of_out: str, a: Array, b: Array) -> bool:
    """Whether a CPU is to multiply a table's rows with `a`, and not `a` with the table.

    With the few rows of a step of decoding, XLA's CPU backend first copies the whole table into
    another order: in fp32 it takes 8 times as long with 8 rows, twice as long with 64.
    """
    is_table = len(of_b) == 2 and of_b[-1] == of_a[-1] and of_out == of_a[:-1] + of_b[0]
    rows = math.prod(a.shape[:-1])
    # In a program that is exported for any number of rows, that number is no integer.
    is_fast = a.dtype == jnp.float32 and isinstance(rows, int) and 1 < rows <= FEW_ROWS
    return is_table and is_fast and target_platform() == "cpu"


def _forward(letters: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(letters, a, b), (a, b)


def _backward(letters: str, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    a, b = saved
    inputs, _, out = letters.partition("->")
    of_a, _, of_b = inputs.partition(",")
    grad = grad.astype(a.dtype)
    grad_a = _in_rows(out, of_b, of_a, grad, b)
    grad_b = _in_rows(of_a, out, of_b, a, grad)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


_product.defvjp(_forward, _backward)

FEW_ROWS = 128
TILES = (128, 64, 32, 16, 8, 4, 2, 1)


def _in_rows(of_a: str, of_b: str, of_out: str, a: Array, b: Array) -> Array:
    """Returns einsum(of_a, of_b -> of_out), on a CPU with what is summed over last on the left.

    XLA's CPU backend has fast products only for operands of that form. The others it leaves to
    Eigen, after widening bfloat16 to fp32, which halves their speed.
    """
    if target_platform() != "cpu":
        return jnp.einsum(f"{of_a},{of_b}->{of_out}", a, b, preferred_element_type=jnp.float32)
    ways = [_Way(of_a, of_b, of_out, a, b), _Way(of_b, of_a, of_out, b, a)]
    return min(ways, key=_Way.copied).compute()


class _Way(NamedTuple):
    """One of the two orders of the operands of a product."""

    of_left: str
    of_right: str
    of_out: str
    left: Array
    right: Array

    @property
    def summed(self) -> str:
        return "".join(letter for letter in self.of_left if letter not in self.of_out)

    @property
    def natural(self) -> str:
        """The letters of the product as it comes: batch, those of the left, those of the right."""
        kept = [letter for letter in self.of_left if letter in self.of_out]
        both = [letter for letter in kept if letter in self.of_right]
        left = [letter for letter in kept if letter not in self.of_right]
        right = [letter for letter in self.of_right if letter not in self.of_left]
        return "".join(both + left + right)

    @property
    def turns(self) -> bool:
        return bool(self.summed) and self.of_left[-1] != self.summed[-1]

    def copied(self) -> int:
        """Returns how many numbers are copied to bring operand and product into order."""
        size = {
            **dict(zip(self.of_left, self.left.shape)),
            **dict(zip(self.of_right, self.right.shape)),
        }
        out = math.prod(size[letter] for letter in self.of_out)
        return self.turns * self.left.size + (self.natural != self.of_out) * out

    def compute(self) -> Array:
        of_left, left = self.of_left, self.left
        if self.turns:
            of_left, left = _summed_last(of_left, self.summed, left)
        letters = f"{of_left},{self.of_right}->{self.natural}"
        out = jnp.einsum(letters, left, self.right, preferred_element_type=jnp.float32)
        if self.natural == self.of_out:
            return out
        out = jax.lax.optimization_barrier(out)
        return out.transpose([self.natural.index(letter) for letter in self.of_out])


def _summed_last(letters: str, summed: str, x: Array) -> tuple[str, Array]:
    """Returns the letters and the array with the dimensions that are summed over last.

    XLA would fold a plain transpose into the product that reads it. This one goes through tiles.
    """
    last = summed[-1]
    at = letters.index(last)
    tile = next(tile for tile in TILES if x.shape[at] % tile == 0)
    order = [letter for letter in letters if letter not in summed] + list(summed)
    shape = [x.shape[letters.index(letter)] for letter in order]
    tiles = x.reshape(*x.shape[:at], -1, tile, *x.shape[at + 1 :])
    of_tiles = letters.replace(last, last + last.upper())
    turned = tiles.transpose([of_tiles.index(letter) for letter in [*order, last.upper()]])
    return "".join(order), jax.lax.optimization_barrier(turned.reshape(shape))
