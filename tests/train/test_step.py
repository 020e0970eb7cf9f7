"""The one train step: by hand, accumulated, rematerialised, on eight devices."""

import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core.batch import Batch
from lm.core.context import Context
from lm.core.mesh import MeshShape, make_mesh
from lm.core.paths import flatten
from lm.models import params as P
from lm.models.stack import REMAT_POLICIES
from lm.train.experiment import load_experiment
from lm.train.objectives import AlphaMix, Generative, Masked
from lm.train.optimizer import AdamW, Muon, Optimizer
from lm.train.schedule import Constant, Cosine
from lm.train.state import Recipe, TrainState, init_state, new_state
from lm.train.step import (
    check_batch,
    check_batch_size,
    gradients,
    jit_step,
    make_train_step,
    pmap_step,
    replicate,
    share_rows,
    train_step,
    unreplicate,
)
from lm.train.trainable import FULL, make_transform
from tests.train.toy import VOCAB_SIZE, ToyData, make_batch, tiny_model

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[2] / "experiments").glob("*.py"))
KEY = jax.random.PRNGKey(3)


class Sgd(Optimizer):
    def transform(self, rate, decay, axes):
        return optax.sgd(rate)


def recipe_of(model=None, optimizer=None, objective=Generative(), **changes) -> Recipe:
    optimizer = optimizer or AdamW(Constant(1e-2))
    return Recipe(model or tiny_model(), objective, optimizer, **changes)


def state_of(recipe: Recipe) -> TrainState:
    params = P.init(recipe.model, jax.random.key(0))
    return new_state(recipe, params, KEY)


# --- one step, by hand -----------------------------------------------------------------------


class Two:
    """A model of two parameters: scores of two classes, one each."""

    vocab_size = 2


def two_parameter_loss(model, params, batch, ctx, key):
    """Cross entropy of the first class, plus something that makes the gradients uneven."""
    loss = jnp.logaddexp(params["a"], 3 * params["kernel"]) - params["a"]
    return loss * batch.weights.sum(), batch.weights.sum(), {}


@pytest.mark.ledger("D02")
def test_adamw_by_hand():
    """Three steps on two parameters against numpy; one of them is a kernel and decays."""
    optimizer = AdamW(Constant(0.1), 0.3, 1.0, beta1=0.8, beta2=0.9, eps=1e-6)
    params = {"a": jnp.asarray(0.5), "kernel": jnp.asarray(-0.7)}
    axes = {"a": (), "kernel": ()}
    transform = make_transform(optimizer, FULL, params, axes)
    state = transform.init(params)
    batch = make_batch(0, 2)
    a, k = np.float64(0.5), np.float64(-0.7)
    m, v = np.zeros(2), np.zeros(2)
    for step in range(1, 4):
        grads = jax.grad(
            lambda p: two_parameter_loss(None, p, batch, None, None)[0] / batch.weights.sum()
        )(params)
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)

        p = np.exp(3 * k) / (np.exp(a) + np.exp(3 * k))
        g = np.array([(1 - p) - 1, 3 * p])
        g /= max(np.sqrt((g**2).sum()), 1.0)
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * g**2
        update = (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-6)
        a -= 0.1 * update[0]
        k -= 0.1 * (update[1] + 0.3 * k)
        assert abs(float(params["a"]) - a) <= 1e-6
        assert abs(float(params["kernel"]) - k) <= 1e-6


@pytest.mark.ledger("D02")
@pytest.mark.parametrize("optimizer", [AdamW(Cosine(3e-3, 20)), Muon(Cosine(3e-3, 20))])
def test_twenty_steps_lower_the_loss(optimizer):
    recipe = recipe_of(optimizer=optimizer)
    step = jax.jit(train_step, static_argnums=0)
    state, losses = state_of(recipe), []
    for index in range(20):
        state, metrics = step(recipe, state, make_batch(index, 16))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < losses[0] - 0.3
    assert int(state.step) == 20


@pytest.mark.ledger("D02")
def test_every_recipe_has_the_same_step():
    """Whatever is trained, and however: one function object."""
    recipes = [
        recipe_of(),
        recipe_of(optimizer=Muon(Constant(1e-3)), micro_batches=2),
        recipe_of(objective=AlphaMix(0.5, Masked(1))),
        *(load_experiment(path).recipe() for path in EXPERIMENTS),
    ]
    steps = [make_train_step(recipe) for recipe in recipes]
    assert all(step.func is train_step and not step.keywords for step in steps)


# --- memory and throughput -------------------------------------------------------------------


@pytest.mark.ledger("D13")
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_equal_one_batch(parts):
    """Rows of 3 to 12 tokens, so that the parts weigh differently."""
    whole = recipe_of()
    params = state_of(whole).params
    batch = make_batch(1, 8)
    weights = [float(batch.weights[i::parts].sum()) for i in range(parts)]
    assert len(set(weights)) > 1
    compiled = jax.jit(gradients, static_argnums=0)
    one, one_metrics = compiled(whole, params, batch, KEY)
    many, many_metrics = compiled(replace(whole, micro_batches=parts), params, batch, KEY)
    for path, leaf in flatten(one).items():
        np.testing.assert_allclose(flatten(many)[path], leaf, atol=1e-5, err_msg=path)
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.perf
@pytest.mark.ledger("D13")
def test_remat_keeps_gradients_and_takes_less_memory():
    """Equal gradients; fewer bytes of temporaries by the compiler's own count.

    A CPU's pinned memory is its memory, so that 'offload' is as 'dots' there.
    """
    model = tiny_model(num_layers=4, num_features=32, mlp_multiplier=8)
    batch = make_batch(1, 64)
    found = {}
    for remat in REMAT_POLICIES:
        recipe = recipe_of(model, remat=remat)
        state = state_of(recipe)
        compiled = jax.jit(gradients, static_argnums=0).lower(recipe, state.params, batch, KEY)
        compiled = compiled.compile()
        grads, _ = compiled(state.params, batch, KEY)
        found[remat] = flatten(grads), compiled.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full", "offload"):
        for path, leaf in found["none"][0].items():
            np.testing.assert_allclose(found[remat][0][path], leaf, atol=1e-6, err_msg=path)
    assert found["full"][1] < 0.7 * found["none"][1]
    assert found["full"][1] < found["dots"][1] < found["none"][1]


@pytest.mark.ledger("D13")
def test_bfloat16_computes_over_float32_parameters():
    recipe = recipe_of(dtype="bfloat16")
    state, metrics = jax.jit(train_step, static_argnums=0)(
        recipe, state_of(recipe), make_batch(0, 8)
    )
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype.name for x in moments} == {"float32"}
    assert metrics["loss"][0].dtype == jnp.float32
    hidden, _ = recipe.model.apply(
        {"params": state.params}, make_batch(0, 8).tokens, recipe.context(True), method="hidden"
    )
    assert hidden.dtype == jnp.bfloat16
    exact, _ = recipe.model.apply(
        {"params": state.params}, make_batch(0, 8).tokens, Context(), method="hidden"
    )
    assert 0 < jnp.abs(hidden - exact).max() < 0.1


# --- devices ---------------------------------------------------------------------------------


def five_steps(recipe: Recipe, step, state, place=lambda batch: batch, one=lambda tree: tree):
    """Returns the losses and gradient norms of five steps, and the last state."""
    numbers = []
    for index in range(5):
        state, metrics = step(state, place(make_batch(index, 16)))
        metrics = one(metrics)
        numbers.append(
            [float(metrics["loss"][0] / metrics["loss"][1]), float(metrics["grad_norm"][0])]
        )
    return np.array(numbers), state


def assert_same_params(ours, theirs):
    for path, leaf in flatten(theirs).items():
        np.testing.assert_allclose(flatten(ours)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.ledger("D03")
@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pmap_equals_one_device(parts):
    """Five steps: losses, gradients, SGD's parameters; and replicas the same bit for bit."""
    recipe = recipe_of(optimizer=Sgd(Constant(0.1)), micro_batches=parts)
    devices = jax.devices()
    assert len(devices) == 8
    single = jax.jit(make_train_step(recipe))
    expected, one = five_steps(recipe, single, state_of(recipe))
    step = pmap_step(recipe, devices)
    numbers, many = five_steps(
        recipe,
        step,
        replicate(state_of(recipe), devices),
        lambda batch: share_rows(batch, 8),
        unreplicate,
    )
    np.testing.assert_allclose(numbers, expected, atol=1e-5)
    assert_same_params(unreplicate(many).params, one.params)
    for path, leaf in flatten(many.params).items():
        replicas = np.asarray(leaf)
        assert replicas.shape[0] == 8
        np.testing.assert_array_equal(replicas, np.broadcast_to(replicas[:1], replicas.shape), path)


@pytest.mark.slow
@pytest.mark.ledger("D03")
def test_pmap_gradients_equal_one_device():
    """At each of five steps, each road with the parameters that it came to itself."""
    recipe = recipe_of(optimizer=Sgd(Constant(0.1)))
    devices, one = jax.devices(), state_of(recipe)
    many = replicate(one, devices)
    single, eight = jax.jit(make_train_step(recipe)), pmap_step(recipe, devices)
    of_one = jax.jit(gradients, static_argnums=0)
    of_eight = jax.pmap(
        lambda params, batch: gradients(recipe, params, batch, KEY, "devices")[0],
        axis_name="devices",
    )
    for index in range(5):
        batch = make_batch(index, 16)
        shared = share_rows(batch, 8)
        grads, _ = of_one(recipe, one.params, batch, KEY)
        assert_same_params(unreplicate(of_eight(many.params, shared)), grads)
        (one, _), (many, _) = single(one, batch), eight(many, shared)


MESHES = {
    "data": MeshShape(),
    "fsdp": MeshShape(data=2, fsdp=4),
    "tensor": MeshShape(data=2, fsdp=2, tensor=2),
}


SGD, MUON = Sgd(Constant(0.1)), Muon(Constant(1e-3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, optimizer",
    [("data", SGD), ("fsdp", SGD), ("tensor", SGD), ("tensor", MUON)],
)
def test_jit_on_a_mesh_equals_one_device(name, optimizer):
    """Losses and gradient norms of five steps on every kind of mesh; SGD's parameters too."""
    model = tiny_model(vocab_size=VOCAB_SIZE + 1)
    recipe = recipe_of(model, optimizer, micro_batches=2)
    expected, one = five_steps(
        recipe,
        jit_step(recipe, make_mesh(devices=jax.devices()[:1])),
        init_state(recipe, 0, make_mesh(devices=jax.devices()[:1])),
    )
    mesh = make_mesh(MESHES[name])
    state = init_state(recipe, 0, mesh)
    numbers, many = five_steps(recipe, jit_step(recipe, mesh), state)
    np.testing.assert_allclose(numbers, expected, atol=1e-5)
    if isinstance(optimizer, Sgd):
        assert_same_params(many.params, one.params)
    kernel = many.params["stack"]["pattern"]["blocks_0"]["mlp"]["layer"]["up"]["kernel"]
    parts = {"data": 1, "fsdp": 4, "tensor": 4}[name]
    assert kernel.addressable_shards[0].data.size == kernel.size // parts


def test_moments_lie_as_their_parameters():
    recipe = recipe_of(tiny_model(vocab_size=VOCAB_SIZE + 1))
    state = init_state(recipe, 0, make_mesh(MESHES["tensor"]))
    shards = {path: leaf.sharding for path, leaf in flatten(state.params).items() if leaf.ndim == 3}
    found = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        for name, sharding in shards.items():
            if path.endswith(name):
                assert leaf.sharding == sharding, path
                found += 1
    assert found == 2 * len(shards) > 0


# --- refusals --------------------------------------------------------------------------------


def test_a_batch_that_weighs_nothing():
    """Refused on the host; in the step it moves nothing but what decay and momentum move."""
    batch = make_batch(0, 4)
    empty = batch.replace(weights=batch.weights * 0)
    with pytest.raises(ValueError, match="every weight of a batch is 0"):
        check_batch(empty, VOCAB_SIZE)
    recipe = recipe_of(optimizer=Sgd(Constant(0.1)))
    state = state_of(recipe)
    after, metrics = jax.jit(train_step, static_argnums=0)(recipe, state, empty)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert metrics["loss"][1] == 0 and metrics["grad_norm"][0] == 0


@pytest.mark.parametrize("name", ["tokens", "targets"])
@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE])
def test_ids_out_of_range(name, wrong):
    batch: Batch = make_batch(0, 4)
    ids = getattr(batch, name).copy()
    ids[1, 1] = wrong
    with pytest.raises(ValueError, match=f"{name} of a batch lie in .* vocabulary 0..10"):
        check_batch(batch.replace(**{name: ids}), VOCAB_SIZE)
    check_batch(next(ToyData().train(4, 0, 0)), VOCAB_SIZE)


def test_sizes_that_do_not_divide():
    check_batch_size(16, 2, 8)
    with pytest.raises(ValueError, match="multiple of 24"):
        check_batch_size(16, 3, 8)
    with pytest.raises(ValueError, match="does not divide 8 devices"):
        make_mesh(MeshShape(tensor=3))
    with pytest.raises(ValueError, match="does not divide 8 devices"):
        make_mesh(MeshShape(data=2, tensor=2))
    recipe = recipe_of()
    words = r"out/kernel of shape \(2, 2, 8, 16\) has 2 along 'heads', which tensor=4 devices"
    with pytest.raises(ValueError, match=words):
        init_state(recipe, 0, make_mesh(MeshShape(tensor=4)))
    with pytest.raises(ValueError, match="the mesh has expert=2, and nothing in this model is"):
        init_state(recipe, 0, make_mesh(MeshShape(expert=2)))


def test_random_objectives_and_dropout_draw_by_step():
    """The key of a step is the run's key and the step's number: nothing drifts."""
    recipe = recipe_of(tiny_model(dropout=0.5))
    step = jax.jit(train_step, static_argnums=0)
    state, batch = state_of(recipe), make_batch(0, 8)
    _, first = step(recipe, state, batch)
    _, again = step(recipe, state, batch)
    _, later = step(recipe, state.replace(step=state.step + 1), batch)
    assert first["loss"][0] == again["loss"][0] != later["loss"][0]
