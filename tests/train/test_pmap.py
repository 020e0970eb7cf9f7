"""Plain data parallelism by `jax.pmap`, for every family, as the mesh has it."""

import jax
import numpy as np
import optax
import pytest

from lm.core.paths import flatten
from lm.models.encdec import EncoderDecoder
from lm.train.objectives import Generative
from lm.train.optimizer import Optimizer
from lm.train.schedule import Constant
from lm.train.state import Recipe, new_state
from lm.train.step import make_train_step, pmap_step, replicate, share_rows, unreplicate
from tests.conformance.harness import FAMILIES, tiny
from tests.train.toy import make_batch

KEY = jax.random.PRNGKey(3)


class Sgd(Optimizer):
    def transform(self, rate, decay, axes):
        return optax.sgd(rate)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_one_device(name):
    """Five steps of two parts each: losses, SGD's parameters, and replicas alike bit for bit."""
    model, params = tiny(name)
    recipe = Recipe(model, Generative(), Sgd(Constant(0.01)), micro_batches=2)
    single, eight = jax.jit(make_train_step(recipe)), pmap_step(recipe)
    one = new_state(recipe, params, KEY)
    many = replicate(one, jax.devices())
    assert len(jax.devices()) == 8
    for index in range(5):
        batch = make_batch(index, 16)
        if isinstance(model, EncoderDecoder):
            batch = batch.replace(source=batch.tokens[:, ::-1], source_segments=batch.segments)
        one, expected = single(one, batch)
        many, metrics = eight(many, share_rows(batch, 8))
        for field in ("loss", "grad_norm"):
            (total, count), (our_total, our_count) = expected[field], metrics[field]
            np.testing.assert_allclose(our_total[0] / our_count[0], total / count, atol=1e-5)
    for path, leaf in flatten(one.params).items():
        replicas = np.asarray(flatten(many.params)[path])
        np.testing.assert_array_equal(replicas, np.broadcast_to(replicas[:1], replicas.shape), path)
        np.testing.assert_allclose(replicas[0], leaf, atol=1e-5, err_msg=path)
    assert int(unreplicate(many).step) == 5
