"""The analytic model against what jax traces and what the compiler of the devices at hand says."""

import math

import jax
import pytest

from lm.core.mesh import MeshShape
from lm.data.random_ids import RandomIds
from lm.models.families.gpt2 import gpt2
from lm.models.families.llama import llama
from lm.train.ahead import batch_shapes, plan_step
from lm.train.analytic import plan_device
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.plan import model_flops, recomputed_flops
from lm.train.schedule import Cosine
from lm.train.state import abstract_state
from lm.train.step import gradients

WITHIN = 1.5


def dots(jaxpr) -> float:
    """Returns the operations of all products of a program but those with ones (`lm.ops.sums`)."""
    total = 0.0
    for eqn in jaxpr.eqns:
        rounds = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            total += rounds * dots(inner) if hasattr(inner, "eqns") else 0
        if eqn.primitive.name == "dot_general":
            (summed, _), (shared, _) = eqn.params["dimension_numbers"]
            left, right = (v.aval.shape for v in eqn.invars)
            out, size = eqn.outvars[0].aval.shape, math.prod(left[dim] for dim in summed)
            rest = [math.prod(s) / size / math.prod(left[d] for d in shared) for s in (left, right)]
            total += 2 * math.prod(out) * size if min(rest) > 8 else 0
    return total


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_the_products_of_the_traced_step(remat, tied):
    """A tied head has no kernel; rows are short, so that attention is two plain products."""
    model = llama(101, 64, 64, 4, 2, 16, num_layers=3, mlp_features=96, tied=tied)
    experiment = small(model, length=20, batch_size=3, remat=remat)
    recipe = experiment.recipe()
    params = abstract_state(recipe).params
    trace = jax.make_jaxpr(lambda params, batch: gradients(recipe, params, batch, KEY))
    counted = dots(trace(params, batch_shapes(experiment)).jaxpr)
    stated = model_flops(params, {}, 3, 20) + recomputed_flops(params, remat, 3, 20)
    assert counted == pytest.approx(stated, rel=1e-6)


KEY = jax.random.PRNGKey(0)


def small(model, length: int, **train) -> Experiment:
    return Experiment(
        "small",
        model,
        RandomIds(model.vocab_size, length),
        AdamW(Cosine(1e-3)),
        TrainConfig(**dict(steps=10, micro_batches=1) | train),
        mesh=MeshShape(data=1),
    )


MODELS = {
    "llama": llama(512, 1024, 128, 4, 2, num_layers=8, mlp_features=352),
    "gpt2": gpt2(512, 1024, 128, 4, num_layers=8),
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "remat", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dots", "full"))]
)
@pytest.mark.parametrize("family, length", [("llama", 512), ("gpt2", 128)])
def test_memory_is_what_the_compiler_lays_out(family, length, remat, dtype):
    """Arguments and output to a per cent, temporaries within a factor of 1.5."""
    experiment = small(MODELS[family], length, batch_size=16, remat=remat, dtype=dtype)
    batch = batch_shapes(experiment)
    compiled = plan_step(jax.devices()[:1], experiment, batch).cost
    stated = plan_device("h200", experiment, batch).cost
    assert stated.argument_bytes == pytest.approx(compiled.argument_bytes, rel=0.01)
    assert stated.output_bytes == pytest.approx(compiled.output_bytes, rel=0.01)
    assert 1 / WITHIN < stated.temporary_bytes / compiled.temporary_bytes < WITHIN
