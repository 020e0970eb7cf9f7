"""A column of its own: save, restore and go on is bit for bit the same as never stopping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.mesh import make_mesh
from lm.models.encdec import EncoderDecoder
from lm.train.checkpoint import Checkpoints
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant
from lm.train.state import Recipe, init_state
from lm.train.step import jit_step
from tests.conformance.harness import FAMILIES, T, cells, random_tokens


def batch_of(model, seed: int) -> Batch:
    tokens = random_tokens(model, (2, T + 1), seed)
    source = tokens[:, ::-1] if isinstance(model, EncoderDecoder) else None
    ones = jnp.ones((2, T))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones.astype(jnp.int32), source=source)


@pytest.mark.parametrize(
    "name", [n if n != "t5" else pytest.param(n, marks=pytest.mark.slow) for n in cells("resume")]
)
def test_resume_is_bit_identical(name, tmp_path):
    family = FAMILIES[name]
    model = family.build(**family.tiny)
    recipe = Recipe(model, Generative(), AdamW(Constant(1e-2)))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = jit_step(recipe, mesh)
    state = init_state(recipe, 0, mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    losses = []
    for number in range(4):
        if number == 2:
            checkpoints = Checkpoints(tmp_path)
            checkpoints.save(state, 2, {})
            checkpoints.wait()
        state, metrics = step(state, batch_of(model, number))
        losses.append(float(metrics["loss"][0]))
    again = checkpoints.restore(shapes, 2)
    checkpoints.close()
    for number in (2, 3):
        again, metrics = step(again, batch_of(model, number))
        assert float(metrics["loss"][0]) == losses[number]
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert losses[0] != losses[1]
