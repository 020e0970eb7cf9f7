"""A column of its own: the same numbers on every mesh, each device with its part of the state."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.mesh import MeshShape, batch_sharding, make_mesh, replicated
from lm.core.paths import flatten
from lm.models.encdec import EncoderDecoder
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state, axes_of, init_state, state_shardings, strip
from lm.train.step import gradients
from tests.conformance.harness import FAMILIES, random_params, random_tokens

ROWS, PLACES = 8, 16
# Sizes that eight devices divide, but for the vocabulary of 61; and two key and value heads.
SIZES = {
    "gpt2": dict(num_heads=8, num_features=64),
    "llama": dict(num_heads=8, num_features=64, mlp_features=96),
    "bert": dict(num_heads=8, num_features=64, mlp_features=96),
    "vanilla": dict(num_heads=8, num_features=64, mlp_features=96),
    "teeny_gpt": dict(num_heads=8, num_features=64, vocab_size=61),
    "t5": dict(num_heads=8, num_features=64, mlp_features=96),
    "mamba": dict(num_features=64),
}
PAIRS = [(8, 1), (4, 2), (2, 4), (1, 8)]
MESHES = {
    **{f"data {a}, tensor {b}": MeshShape(data=a, tensor=b) for a, b in PAIRS},
    **{f"fsdp {a}, tensor {b}": MeshShape(data=1, fsdp=a, tensor=b) for a, b in PAIRS},
    "data 2, fsdp 2, tensor 2": MeshShape(data=2, fsdp=2, tensor=2),
}
FAST = {("llama", "data 2, fsdp 2, tensor 2")}
# The contract, written out a second time: mesh axis of each logical axis.
LIES_ON = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def build(name: str):
    return FAMILIES[name].build(**{**FAMILIES[name].tiny, **SIZES[name]})


def batch_of(model) -> Batch:
    tokens = np.asarray(random_tokens(model, (ROWS, PLACES + 1)))
    lengths = np.random.default_rng(1).integers(PLACES // 2, PLACES + 1, (ROWS, 1))
    segments = (np.arange(PLACES) < lengths).astype(np.int32)
    source = np.ascontiguousarray(tokens[:, :0:-1]) if isinstance(model, EncoderDecoder) else None
    weights = segments.astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, source=source)


@functools.cache
def on_one_device(name: str):
    """Returns a recipe, fresh and random parameters, and the loss and gradients of the latter."""
    model = build(name)
    recipe = Recipe(model, Generative(), AdamW(Constant(1e-2)))
    fresh = init_state(recipe, 3, make_mesh(devices=jax.devices()[:1])).params
    params = random_params(model)
    grads, metrics = jax.jit(gradients, static_argnums=0)(
        recipe, params, batch_of(model), jax.random.PRNGKey(0)
    )
    return recipe, jax.tree.map(np.asarray, (fresh, params, grads, metrics["loss"]))


def shard_shape(spec, shape, mesh, vocab_size: int) -> tuple[int, ...]:
    """The declared shape of a device's part, vocabularies padded, few heads whole."""
    found = []
    for name, size in zip(spec, shape):
        over = mesh.shape.get(LIES_ON.get(name), 1)
        if name == "mlp" and "embed" not in spec:
            over *= mesh.shape["fsdp"]
        if name == "vocab":
            size = -(-vocab_size // over) * over
        elif name == "kv_heads" and size < over:
            over = 1
        found.append(size // over)
        assert size % over == 0
    return tuple(found)


def cells():
    """Every family on every mesh; but for two, with the slow tests."""
    pairs = itertools.product(SIZES, MESHES)
    return [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in pairs]


@pytest.mark.ledger("D04", "P094")
@pytest.mark.parametrize("name, mesh_name", cells())
def test_a_mesh_changes_no_number(name, mesh_name):
    mesh = make_mesh(MESHES[mesh_name])
    recipe, (fresh, params, grads, loss) = on_one_device(name)
    model = recipe.model

    # Fresh parameters.
    state = init_state(recipe, 3, mesh)
    for path, leaf in flatten(strip(recipe, state.params, state.params)).items():
        np.testing.assert_allclose(leaf, flatten(fresh)[path], atol=1e-6, err_msg=path)

    # What each device holds, leaf by leaf.
    axes = axes_of(model)
    for path, leaf in flatten(state.params).items():
        declared = shard_shape(axes[path], leaf.shape, mesh, model.vocab_size)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {declared}, path

    check_gradients(recipe, mesh, params, grads, loss)


def check_gradients(recipe, mesh, params, grads, loss):
    """Compares loss and gradients of parameters that are all random with one device's."""
    model, axes = recipe.model, axes_of(recipe.model)
    state = init_state(recipe, 3, mesh, params)
    shardings = state_shardings(recipe, mesh, state).params

    def gradients_of(params, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(recipe, params, batch, jax.random.PRNGKey(0))

    many, metrics = jax.jit(
        gradients_of,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )(state.params, batch_of(model))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    stripped = flatten(strip(recipe, state.params, many))
    for path, leaf in flatten(grads).items():
        np.testing.assert_allclose(stripped[path], leaf, atol=1e-5, err_msg=path)
    for path, leaf in flatten(many).items():
        if "vocab" in axes[path]:
            room = np.delete(leaf, np.arange(model.vocab_size), axes[path].index("vocab"))
            assert not room.any(), path


STREAMS = [
    pytest.param(name, shape, marks=() if (name, shape.tensor) == ("gpt2", 2) else pytest.mark.slow)
    for name in SIZES
    for shape in (MeshShape(data=2, fsdp=2, tensor=2), MeshShape(data=1, fsdp=2, tensor=4))
]


@pytest.mark.parametrize("name, shape", STREAMS)
def test_a_stream_that_tensor_divides_changes_no_number(name, shape):
    recipe, (_, params, grads, loss) = on_one_device(name)
    divided = dataclasses.replace(recipe, sequence_parallel=True)
    check_gradients(divided, make_mesh(shape), params, grads, loss)


# Published models whose heads eight devices divide.
PUBLISHED = {
    "gpt2": "medium",
    "llama": "llama2-7b",
    "bert": "large",
    "mamba": "130m",
    "t5": "small",
}


@pytest.mark.parametrize("fsdp, tensor", PAIRS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_divided(name, fsdp, tensor):
    """Of parameters, and of moments, each device holds at most 1.1 of its even share."""
    mesh = make_mesh(MeshShape(data=1, fsdp=fsdp, tensor=tensor))
    model = FAMILIES[name].build(**FAMILIES[name].presets[PUBLISHED[name]])
    recipe = Recipe(model, Generative(), AdamW(Constant(1e-2)))
    state = abstract_state(recipe, mesh)
    where = state_shardings(recipe, mesh, state)
    for tree, shardings in ((state.params, where.params), (state.opt_state, where.opt_state)):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        share = sum(math.prod(where.shard_shape(leaf.shape)) for leaf, where in pairs)
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        assert share <= 1.1 * total / mesh.size, share * mesh.size / total
