"""A vocabulary divided over eight devices, which do not divide its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.core.mesh import MeshShape, make_mesh
from lm.ops.loss import cross_entropy
from lm.ops.vocabulary import divided_cross_entropy, divided_embed, pad_vocabulary

V, D, B, T = 61, 16, 4, 6
AXES = ("stage", "tensor")


@pytest.mark.ledger("P025")
def test_equals_the_whole_vocabulary():
    """Embedding, loss, correct tokens and gradients, tied as in GPT-2 and with a table apart."""
    mesh = make_mesh(MeshShape(data=1, stage=4, tensor=2))
    rng = np.random.default_rng(0)
    table, head = (jnp.asarray(rng.normal(size=(V, D)), jnp.float32) for _ in range(2))
    tokens = jnp.asarray(rng.integers(0, V, (B, T)))
    # The last device has fewer tokens than the others, and they are asked for, too.
    targets = jnp.asarray(rng.integers(0, V, (B, T))).at[0, 0].set(V - 1).at[1].set(tokens[1])
    weights = jnp.asarray(rng.uniform(size=(B, T)), jnp.float32).at[2, 3:].set(0)

    def whole(tables):
        table, head = tables
        logits = jnp.einsum("btd,vd->btv", jnp.tanh(table[tokens]), head)
        sums = cross_entropy(logits, targets, weights)
        return sums.loss, sums

    def divided(tables):
        table, head = (pad_vocabulary(t, 8) for t in tables)
        x = jnp.tanh(divided_embed(table, tokens, AXES))
        sums = divided_cross_entropy(x, head, targets, weights, V, AXES)
        return sums.loss, sums

    for tables in ((table, head), (table, table)):
        with jax.set_mesh(mesh):
            ours, sums = jax.jit(jax.grad(divided, has_aux=True))(tables)
        theirs, expected = jax.jit(jax.grad(whole, has_aux=True))(tables)
        for name in ("loss", "nll", "correct", "weight"):
            np.testing.assert_allclose(getattr(sums, name), getattr(expected, name), rtol=1e-5)
        for grad, slope in zip(ours, theirs):
            np.testing.assert_allclose(grad, slope, atol=1e-5)
    assert float(expected.correct) > 0


@pytest.mark.ledger("P025")
def test_bytes_of_a_device():
    """ceil(V / 8) rows of D numbers on each of the eight."""
    mesh = make_mesh(MeshShape(data=1, stage=4, tensor=2))
    where = NamedSharding(mesh, PartitionSpec(AXES))
    table = jax.jit(lambda: pad_vocabulary(jnp.ones((V, D)), 8), out_shardings=where)()
    sizes = [shard.data.nbytes for shard in table.addressable_shards]
    assert sizes == [8 * D * 4] * 8


@pytest.mark.ledger("P025")
def test_the_largest_of_equals():
    """Of equal logits the first is the likeliest, on whichever devices they lie."""
    mesh = make_mesh(MeshShape(data=1, stage=4, tensor=2))
    head, x = pad_vocabulary(jnp.ones((V, D)), 8), jnp.ones((1, 3, D))
    with jax.set_mesh(mesh):
        sums = jax.jit(
            lambda: divided_cross_entropy(
                x, head, jnp.asarray([[0, 1, V - 1]]), jnp.ones((1, 3)), V, AXES
            )
        )()
    assert float(sums.correct) == 1
    np.testing.assert_allclose(sums.loss, 3 * np.log(V), rtol=1e-6)
