"""Tensor parallelism as Megatron-LM has it: what is sent, and what each device holds."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lm.core.context import Context
from lm.core.mesh import MeshShape, batch_sharding, make_mesh
from lm.core.paths import flatten
from lm.models.families.gpt2 import gpt2
from lm.models.families.llama import llama
from lm.train.experiment import TrainConfig
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state, state_shardings, strip
from lm.train.step import jit_step

SENDING = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def recipe_of(family: str, layers: int) -> Recipe:
    if family == "gpt2":
        model = gpt2(64, 32, num_features=64, num_heads=8, num_layers=layers)
    else:
        model = llama(64, 32, num_features=64, num_heads=8, num_layers=layers, mlp_features=96)
    return Recipe(model, Generative(), AdamW(Constant(1e-3)))


def sent(recipe: Recipe, tensor: int, layers: int, **way) -> dict[str, int]:
    """Counts the collectives of a forward pass by kind, its layers unrolled."""
    mesh = make_mesh(MeshShape(tensor=tensor))
    state = abstract_state(recipe, mesh)
    ctx = Context(unroll=layers, **way)

    def forward(params, tokens_BT):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return recipe.model.apply({"params": strip(recipe, params, params)}, tokens_BT, ctx)[0]

    shardings = state_shardings(recipe, mesh, state).params
    tokens_BT = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    compiled = jax.jit(forward, in_shardings=(shardings, batch_sharding(mesh)))
    text = compiled.lower(state.params, tokens_BT).compile().as_text()
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in SENDING}


@pytest.mark.ledger("P094")
@pytest.mark.parametrize("tensor", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_block_sends_two_sums(family, tensor):
    """One after attention and one after the MLP, forwards (Shoeybi et al., 2019)."""
    two, four = (sent(recipe_of(family, layers), tensor, layers) for layers in (2, 4))
    more = {kind: four[kind] - two[kind] for kind in SENDING}
    assert more == {**dict.fromkeys(SENDING, 0), "all-reduce": 2 * 2}


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_divided_stream_is_gathered_and_summed_twice_a_block(family):
    """Before and after attention and the MLP (Korthikanti et al., 2022).

    XLA's CPU backend cuts the sums down where TPU's scatters them (`test_ahead.py`).
    """
    two, four = (
        sent(recipe_of(family, layers), 4, layers, sequence_parallel=True) for layers in (2, 4)
    )
    more = {kind: four[kind] - two[kind] for kind in SENDING}
    assert more == {**dict.fromkeys(SENDING, 0), "all-reduce": 2 * 2, "all-gather": 2 * 2}


def test_places_that_tensor_does_not_divide_are_refused():
    recipe = recipe_of("gpt2", 2)
    mesh = make_mesh(MeshShape(tensor=8))
    tokens_BT = jnp.ones((8, 20), jnp.int32)
    params = abstract_state(recipe).params
    ctx = Context(sequence_parallel=True)

    def forward(params):
        return recipe.model.apply({"params": params}, tokens_BT, ctx)[0]

    message = "rows of 20 places do not divide over the mesh's tensor=8: choose .* multiple of 8"
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(ValueError, match=message),
    ):
        jax.eval_shape(forward, params)


def test_a_stream_with_nothing_to_divide_it_is_refused():
    divided = replace(recipe_of("gpt2", 2), sequence_parallel=True)
    with pytest.raises(ValueError, match=r"the mesh's axis tensor, which is 1: .* --mesh tensor=2"):
        jit_step(divided, make_mesh(MeshShape(data=8)))
    with pytest.raises(
        ValueError, match=r"leave train.sequence_parallel off, or train with .*'jit'"
    ):
        TrainConfig(steps=1, batch_size=8, parallel="pmap", sequence_parallel=True)


@pytest.mark.ledger("P094")
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_device_holds_its_share_of_a_block(tensor):
    """Of every kernel exactly 1/n."""
    mesh = make_mesh(MeshShape(tensor=tensor))
    recipe = recipe_of("gpt2", 2)
    state = abstract_state(recipe, mesh)
    shardings = flatten(state_shardings(recipe, mesh, state).params)
    kernels = {p: leaf for p, leaf in flatten(state.params).items() if p.endswith("kernel")}
    assert len(kernels) == 6
    for path, leaf in kernels.items():
        share = jnp.prod(jnp.asarray(shardings[path].shard_shape(leaf.shape)))
        assert share * tensor == leaf.size, path
