"""Products and sums with backward passes of their own, against einsum and fp64."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops.product import product
from lm.ops.sums import column_sums, spread

CASES = {
    "projection": ("abi,io->abo", (2, 24, 8), (8, 6)),
    "tied head": ("abi,oi->abo", (2, 80, 8), (13, 8)),
    "tied head, few rows": ("abi,oi->abo", (4, 2, 8), (13, 8)),
    "tied head, one row": ("abi,oi->abo", (1, 1, 8), (13, 8)),
    "odd rows": ("ai,io->ao", (7, 8), (8, 6)),
    "scores": ("btkgh,bskh->bkgts", (2, 8, 2, 3, 4), (2, 6, 2, 4)),
    "values": ("bkgts,bskh->bkgth", (2, 2, 3, 8, 6), (2, 6, 2, 4)),
    "by row": ("bti,bir->btr", (2, 5, 8), (2, 8, 3)),
}


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("name", CASES)
def test_equals_einsum_in_both_directions(name):
    letters, *shapes = CASES[name]
    a, b = (draw(shape, seed) for seed, shape in enumerate(shapes))
    grad = draw(np.einsum(letters, a, b).shape, 2)
    inputs, _, out = letters.partition("->")
    of_a, of_b = inputs.split(",")
    expected = (
        np.einsum(letters, a, b),
        np.einsum(f"{out},{of_b}->{of_a}", grad, b),
        np.einsum(f"{of_a},{out}->{of_b}", a, grad),
    )

    @jax.jit
    def ours(a, b, grad):
        out, back = jax.vjp(lambda a, b: product(letters, a, b), a, b)
        return out, *back(grad)

    grad = jnp.asarray(grad, jnp.float32)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.02)):
        found = ours(jnp.asarray(a, dtype), jnp.asarray(b, dtype), grad)
        assert found[0].dtype == jnp.float32 and found[1].dtype == found[2].dtype == dtype
        for leaf, wanted in zip(found, expected):
            error = np.abs(np.asarray(leaf, np.float64) - wanted).max()
            assert error <= tolerance * np.abs(wanted).max()


def test_a_number_of_rows_may_be_left_open():
    table = jnp.asarray(draw((13, 8), 0), jnp.float32)
    (rows,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((rows, 1, 8), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: product("abi,oi->abo", x, table)))(x)
    for count in (1, 3):
        x = draw((count, 1, 8), count)
        expected = np.einsum("abi,oi->abo", x, table)
        found = program.call(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.perf
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA multiplies on a CPU")
def test_no_operand_of_low_precision_is_widened_on_a_cpu():
    """The compiled products read bfloat16, whatever becomes of their results."""

    def step(x, kernel):
        def loss(x, kernel):
            y = product("abi,io->abo", x, kernel).astype(x.dtype)
            return product("abi,oi->abo", y, kernel).sum()

        # Transposed gradients would be folded into their products.
        return [grad.swapaxes(-1, -2) for grad in jax.grad(loss, (0, 1))(x, kernel)]

    x, kernel = jnp.ones((2, 96, 64), jnp.bfloat16), jnp.ones((64, 32), jnp.bfloat16)
    compiled = jax.jit(step).lower(x, kernel).compile()
    compiled(x, kernel)
    bodies = [body for body in compiled.as_text().split("\n\n") if re.search(r" dot\(", body)]
    assert len(bodies) == 5
    for body in bodies:
        for operands in re.findall(r" dot\(([^)]*)\)", body):
            for name in operands.split(", "):
                assert re.search(rf"{re.escape(name)} = bf16\[", body), body


def test_sums_and_their_gradients():
    x = draw((3, 5, 2, 4), 0)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.02)):
        low = jnp.asarray(x, dtype)
        for num_last, axes in ((1, (0, 1, 2)), (2, (0, 1))):
            found = jax.jit(column_sums, static_argnums=1)(low, num_last)
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, x.sum(axes), atol=10 * tolerance)
        vector = jnp.asarray(draw((2, 4), 1), jnp.float32)
        out, back = jax.vjp(lambda vector, low=low: spread(vector, low), vector)
        assert out.shape == low.shape and out.dtype == dtype
        (grad,) = back(low)
        assert grad.dtype == jnp.float32
        np.testing.assert_allclose(grad, x.sum((0, 1)), atol=10 * tolerance)
