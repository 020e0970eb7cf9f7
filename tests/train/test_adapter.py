"""Training an adapter: what changes, what does not, and what it costs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.mesh import MeshShape, make_mesh
from lm.core.paths import flatten
from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.leaving import merge_model
from lm.models import adapters
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.opening import load
from lm.train.loop import train
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW, Muon
from lm.train.schedule import Constant
from lm.train.state import Recipe, init_state, new_state
from lm.train.step import evaluate_batch, gradients, jit_step, train_step
from lm.train.trainable import ADAPTER, FULL
from tests.train.toy import make_batch, tiny_model, toy_experiment

EVERY = LoRA(4, targets=("*/kernel",))
RECIPE = Recipe(
    tiny_model(), Generative(), AdamW(Constant(1e-2), weight_decay=0.1), ADAPTER, adapter=EVERY
)


jit_gradients = jax.jit(gradients, static_argnums=0)


def start(recipe=RECIPE):
    key = jax.random.PRNGKey(1)
    return new_state(recipe, recipe.prepare(P.init(recipe.model, key), key), key)


def steps(recipe, state, count):
    step = jax.jit(train_step, static_argnums=0)
    for index in range(count):
        state, metrics = step(recipe, state, make_batch(index, 4))
    return state, metrics


def moments(opt_state):
    """Returns the leaves of an optimizer's state that are as large as parameters."""
    return {
        jax.tree_util.keystr(keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
        if ".mu" in jax.tree_util.keystr(keys) or ".nu" in jax.tree_util.keystr(keys)
    }


@pytest.mark.ledger("D05")
@pytest.mark.parametrize("count", [10, 100])
def test_the_base_stays_bit_for_bit(count):
    """AdamW with decay moves every B and no base; its moments are those of A and B alone."""
    before = start()
    _, adapter = adapters.split(before.params)
    factors = {path: leaf for path, leaf in flatten(adapter).items() if path[-1] in "ab"}
    held = moments(before.opt_state)
    assert sum(leaf.size for leaf in held.values()) == 2 * P.count(factors)
    assert all("lora_a" in name or "lora_b" in name for name in held)
    after, _ = steps(RECIPE, before, count)
    for path, leaf in flatten(after.params).items():
        old = np.asarray(flatten(before.params)[path])
        if path in factors:
            assert (np.asarray(leaf) != old).any(), path
        else:
            assert np.asarray(leaf).tobytes() == old.tobytes(), path


def test_gradients_are_the_adapters_alone():
    state = start()
    grads, _ = jit_gradients(RECIPE, state.params, make_batch(0, 4), state.rng)
    assert {path.rpartition("/")[2] for path in flatten(grads)} == {"lora_a", "lora_b"}


def test_no_gradient_of_the_base_is_computed():
    """The compiled step does 4 operations for a frozen weight where full training does 6."""
    model = tiny_model(num_features=128, mlp_multiplier=4)
    flops = {}
    for name, adapter in {"full": None, "lora": LoRA(1, targets=("*/q/kernel",))}.items():
        table = FULL if adapter is None else ADAPTER
        recipe = replace(RECIPE, model=model, trainable=table, adapter=adapter)
        lowered = jax.jit(train_step, static_argnums=0).lower(
            recipe, jax.eval_shape(partial(start, recipe)), make_batch(0, 16)
        )
        flops[name] = lowered.compile().cost_analysis()["flops"]
    assert flops["lora"] <= 0.7 * flops["full"]


def test_clipping_sees_the_adapter_alone():
    """The norm that is reported and clipped is that of the adapter's gradient."""
    state = start()
    grads, metrics = jit_gradients(RECIPE, state.params, make_batch(0, 4), state.rng)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    _, metrics = steps(RECIPE, state, 1)
    assert abs(float(metrics["grad_norm"][0]) - norm) <= 1e-5 * norm
    small = replace(RECIPE, optimizer=replace(RECIPE.optimizer, clip_norm=norm / 100))
    clipped, _ = steps(small, start(small), 1)
    nu = sum(
        float(leaf.sum()) for name, leaf in moments(clipped.opt_state).items() if ".nu" in name
    )
    # After one step, nu is 0.05 g^2.
    assert abs(np.sqrt(nu / 0.05) - norm / 100) <= 1e-4 * norm / 100


@pytest.mark.slow
def test_decay_acts_on_both_factors():
    """With gradients of zero: A and B shrink, the lengths of columns do not."""
    recipe = replace(RECIPE, adapter=replace(EVERY, dora=True))
    params = start(recipe).params
    trained, _ = recipe.split(params)
    transform = recipe.transform(params)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = transform.update(zeros, transform.init(trained), trained)
    for path, leaf in flatten(trained).items():
        decayed = path.endswith(("lora_a", "lora_b"))
        expected = -1e-3 * leaf if decayed else jnp.zeros_like(leaf)
        np.testing.assert_allclose(flatten(updates)[path], expected, atol=1e-7)


def test_zeros_of_lower_ranks_stay():
    lora = replace(EVERY, ranks=(adapters.Rank("*/q/kernel", 2, (0,)),))
    recipe = replace(RECIPE, adapter=lora)
    state, _ = steps(recipe, start(recipe), 5)
    (path,) = (path for path in flatten(state.params) if path.endswith("q/lora_a"))
    a, b = (np.asarray(flatten(state.params)[path[:-1] + name]) for name in "ab")
    assert not a[0, ..., 2:].any() and not b[0, 2:].any()
    assert a[0, ..., :2].all() and a[1].all() and b[1].all()


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen_dtype": "bfloat16"},
        pytest.param({"adapter": replace(EVERY, dropout=0.2)}, marks=pytest.mark.slow),
        {"adapter": replace(EVERY, dora=True), "dtype": "bfloat16", "remat": "full"},
        pytest.param({"optimizer": Muon(Constant(1e-2))}, marks=pytest.mark.slow),
    ],
    ids=["base in bfloat16", "dropout", "dora in bfloat16", "muon"],
)
@pytest.mark.slow
def test_it_learns(changes):
    recipe = replace(RECIPE, **changes)
    before = start(recipe)
    base, _ = adapters.split(before.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {recipe.frozen_dtype}
    _, adapter = adapters.split(before.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {"float32"}
    after, _ = steps(recipe, before, 40)
    losses = [evaluate_batch(recipe, s.params, make_batch(99, 8))["loss"] for s in (before, after)]
    first, last = (float(total / weight) for total, weight in losses)
    assert last < first - 0.3


@pytest.mark.slow
def test_on_a_mesh():
    """The step on eight devices, parameters and heads divided, gives one device's numbers."""
    recipe = replace(RECIPE, model=tiny_model(vocab_size=12))
    batch = make_batch(0, 8)
    found = []
    for mesh in (make_mesh(MeshShape(), jax.devices()[:1]), make_mesh(MeshShape(2, 2, 2))):
        state = init_state(recipe, 0, mesh)
        state, metrics = jit_step(recipe, mesh, state)(state, batch)
        found.append((jax.device_get(state.params), float(metrics["loss"][0])))
    (one, one_loss), (eight, eight_loss) = found
    assert abs(one_loss - eight_loss) <= 1e-4
    for path, leaf in flatten(one).items():
        if not path.endswith("lora_a"):  # Its gradient is zero at first, B being zero.
            np.testing.assert_allclose(flatten(eight)[path], leaf, atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_a_run_with_an_adapter(tmp_path):
    """Trained on given parameters, stopped and gone on, and opened with its adapter."""
    quiet = {"echo": lambda line: None, "progress": False}
    experiment = replace(toy_experiment(steps=6), adapter=LoRA(2, dropout=0.1))
    base = P.init(experiment.model, jax.random.key(7))
    result = train(experiment, tmp_path / "whole", params=base, **quiet)
    assert result.step == 6
    teeny_gpt_tokenizer().save(tmp_path / "whole")
    loaded = load(tmp_path / "whole", step=6, mesh=make_mesh())
    kept, adapter = adapters.split(loaded.params)
    for path, leaf in flatten(kept).items():
        np.testing.assert_array_equal(leaf, flatten(base)[path])
    assert all(leaf.any() for leaf in flatten(adapter).values())
    # Another run begins from it as one that has no adapter, and computes the same.
    merged = load(merge_model(tmp_path / "whole", tmp_path / "merged"))
    assert flatten(merged.params).keys() == flatten(base).keys()
    rows = [[3, 4, 5, 6, 7]]
    theirs = load(tmp_path / "whole").logits(rows)
    np.testing.assert_allclose(merged.logits(rows), theirs, atol=1e-5)
    again = train(experiment, tmp_path / "whole", **quiet)
    assert again.step == 6
    full = replace(experiment, adapter=None, trainable=None).recipe()
    assert full.trainable == FULL and experiment.recipe().trainable == ADAPTER
