"""Products of activations and kernels, forwards and backwards, as each backend does them best."""

from functools import partial

import jax
import jax.numpy as jnp

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
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


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

TILE = 128


def _in_rows(of_a: str, of_b: str, of_out: str, a: Array, b: Array) -> Array:
    """Returns einsum(of_a, of_b -> of_out), on a CPU with the rows of `a` along what is summed.

    XLA's CPU backend has fast products only for operands whose last dimension is summed over on
    the left. The others it leaves to Eigen, and widens bfloat16 to fp32 before. A transpose that
    stands before a product is folded into it, and so this one goes through tiles, behind a barrier.
    """
    summed = [letter for letter in of_a if letter not in of_out]
    last = summed[-1] if summed else ""
    turns = jax.default_backend() == "cpu" and summed and of_a[-1] != last
    if not turns:
        return jnp.einsum(f"{of_a},{of_b}->{of_out}", a, b, preferred_element_type=jnp.float32)
    size = a.shape[of_a.index(last)]
    tile = next(tile for tile in (TILE, 64, 32, 16, 8, 4, 2, 1) if size % tile == 0)
    order = [letter for letter in of_a if letter in of_out] + summed
    shape = [a.shape[of_a.index(letter)] for letter in order]
    at = of_a.index(last)
    split = a.reshape(*a.shape[:at], size // tile, tile, *a.shape[at + 1 :])
    tiled = of_a.replace(last, last + last.upper())
    turned = split.transpose([tiled.index(letter) for letter in [*order, last.upper()]])
    a = jax.lax.optimization_barrier(turned.reshape(shape))
    own = [letter for letter in of_a if letter in of_out and letter not in of_b]
    theirs = [letter for letter in of_b if letter in of_out and letter not in of_a]
    both = [letter for letter in of_a if letter in of_out and letter in of_b]
    natural = "".join(both + own + theirs)
    letters = f"{''.join(order)},{of_b}->{natural}"
    found = jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)
    if natural == of_out:
        return found
    found = jax.lax.optimization_barrier(found)
    return found.transpose([natural.index(letter) for letter in of_out])
