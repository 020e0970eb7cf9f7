"""The pipeline alone, on layers of a line, against a loop over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.mesh import MeshShape, make_mesh, num_stages
from lm.core.pipeline import Schedule
from lm.models.pipeline import pipelined

B, T, D = 12, 5, 6
slow = pytest.mark.slow


def layer(w, x_BTD, positions_BT, memory_BSD, bias_NTS, noise):
    """Reads everything that a layer of a model may read."""
    mixed = jnp.einsum("nts,bsd->btd", bias_NTS, x_BTD)
    return (
        jnp.tanh(x_BTD @ w + positions_BT[..., None] + mixed + memory_BSD.mean(1)[:, None]) * noise
    )


def noise_of(key):
    return 1 + 0.1 * jax.random.normal(key, ())


def layers(params, x_BTD, ctx, key):
    """A chunk, whose key says a number that all of its layers share."""
    for w in params["w"]:
        args = ctx.positions_BT, ctx.memory_BSD, ctx.bias_NTS, noise_of(key)
        x_BTD = layer(w, x_BTD, *args)
    return x_BTD


def one_by_one(params, x_BTD, ctx, key, parts, runs):
    """The oracle: all rows through one layer after the other, each row with its own noise."""
    args = ctx.positions_BT, ctx.memory_BSD, ctx.bias_NTS
    for index, w in enumerate(params["w"]):
        run = index * runs // len(params["w"])
        part_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B) % parts)
        keys = jax.vmap(jax.random.fold_in, (0, None))(part_keys, run)
        x_BTD = layer(w, x_BTD, *args, jax.vmap(noise_of)(keys)[:, None, None])
    return x_BTD


@pytest.mark.parametrize(
    "stages, parts, chunks",
    [(2, 3, 1), (4, 4, 3), *(pytest.param(*case, marks=slow) for case in [(4, 12, 1), (2, 4, 3)])],
)
def test_equals_a_loop(stages, parts, chunks):
    """Outputs and gradients of parameters, rows, memory and bias; rows keep their own context."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"w": 0.3 * draw(12, D, D)}
    operands = params, draw(B, T, D), draw(B, 3, D), 0.1 * draw(2, T, T)
    positions, key, weigh = draw(B, T), jax.random.PRNGKey(5), draw(B, T, D)
    mesh = make_mesh(MeshShape(stage=stages))

    def loss(run, params, x, memory, bias):
        ctx = Context(positions_BT=positions, memory_BSD=memory, bias_NTS=bias)
        return (weigh * run(params, x, ctx)).sum()

    def ours(params, x, ctx):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            assert num_stages() == stages
            return pipelined(layers, params, x, ctx, Schedule(stages, parts, chunks), key)

    def theirs(params, x, ctx):
        return one_by_one(params, x, ctx, key, parts, stages * chunks)

    with jax.set_mesh(mesh):
        value, grads = jax.jit(
            lambda *args: jax.value_and_grad(lambda *a: loss(ours, *a), (0, 1, 2, 3))(*args)
        )(*operands)
    expected, slopes = jax.jit(
        lambda *args: jax.value_and_grad(lambda *a: loss(theirs, *a), (0, 1, 2, 3))(*args)
    )(*operands)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, slope in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes)):
        assert np.abs(slope).max() > 0
        np.testing.assert_allclose(grad, slope, atol=1e-5 * float(np.abs(slope).max()))


def test_without_a_mesh_there_is_one_stage():
    assert num_stages() == 1
