"""Training with layers on several stages equals training on one device."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.mesh import MeshShape, batch_sharding, make_mesh
from lm.core.paths import flatten
from lm.core.pipeline import Pipeline
from lm.layers.norm import LayerNorm
from lm.models import params as P
from lm.models.families.gpt2 import gpt2
from lm.models.families.llama import llama
from lm.models.families.mamba import FAMILY as MAMBA
from lm.models.families.t5 import FAMILY as T5
from lm.models.stack import Stack
from lm.ops.rotary import Rotary
from lm.train.experiment import TrainConfig
from lm.train.loop import train
from lm.train.metrics import read_metrics
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state, init_state, state_shardings
from lm.train.step import evaluate_batch, gradients, jit_evaluate, jit_step
from tests.conformance.harness import random_params
from tests.train.toy import make_batch, tiny_model, toy_experiment

KEY = jax.random.PRNGKey(3)
VOCAB_SIZE, ROWS = 16, 16
SIZES = dict(vocab_size=VOCAB_SIZE, max_length=16, num_features=16, num_heads=2, num_layers=4)
MODELS = {
    "gpt2": gpt2(**SIZES),
    "llama": llama(**SIZES, num_kv_heads=2, mlp_features=24, rotary=Rotary(500.0)),
}
GPIPE, INTERLEAVED = Pipeline(4), Pipeline(4, chunks=2)


def recipe_of(model, **changes) -> Recipe:
    return Recipe(model, Generative(), AdamW(Constant(1e-2)), **changes)


def stages_alone(stages: int):
    return make_mesh(MeshShape(data=1, stage=stages), jax.devices()[:stages])


def on_mesh(recipe: Recipe, mesh):
    """Returns the jitted gradients of a recipe on a mesh."""

    def step(params, batch, key):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(recipe, params, batch, key)

    shardings = state_shardings(recipe, mesh, abstract_state(recipe)).params
    return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh), None))


def single(recipe: Recipe, params, batch):
    return jax.jit(gradients, static_argnums=0)(recipe, params, batch, KEY)


def assert_equal(ours, theirs, tolerance: float):
    """Compares gradients and metrics."""
    grads, metrics = ours
    expected, numbers = theirs
    for path, leaf in flatten(expected).items():
        np.testing.assert_allclose(flatten(grads)[path], leaf, atol=tolerance, err_msg=path)
    for name, value in numbers.items():
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, err_msg=name)


def compare(recipe: Recipe, mesh, tolerance: float, batch=None):
    params = random_params(recipe.model)
    batch = make_batch(1, ROWS) if batch is None else batch
    ours = on_mesh(recipe, mesh)(params, batch, KEY)
    assert_equal(ours, single(recipe, params, batch), tolerance)


# --- equal to one device ---------------------------------------------------------------------

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name, stages, pipeline",
    [
        pytest.param("gpt2", 2, GPIPE, marks=slow),
        pytest.param("gpt2", 2, INTERLEAVED, marks=slow),
        pytest.param("gpt2", 4, GPIPE, marks=slow),
        pytest.param("gpt2", 4, INTERLEAVED, marks=slow),
        pytest.param("llama", 2, GPIPE, marks=slow),
        ("llama", 2, INTERLEAVED),
        pytest.param("llama", 4, GPIPE, marks=slow),
        pytest.param("llama", 4, INTERLEAVED, marks=slow),
    ],
)
def test_gradients_equal_one_device(name, stages, pipeline):
    """Rows of 3 to 12 tokens, which travel with their segments."""
    model = MODELS[name].clone(stack=MODELS[name].stack.clone(repeats=4 * pipeline.chunks))
    compare(recipe_of(model, pipeline=pipeline), stages_alone(stages), 1e-5)


@pytest.mark.slow
@pytest.mark.ledger("P073", "L29")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pipeline", [GPIPE, INTERLEAVED])
def test_data_tensor_and_stages_equal_one_device(name, pipeline):
    """2 x 2 x 2: gradients of one batch, and losses and gradient norms of five steps."""
    mesh = make_mesh(MeshShape(data=2, tensor=2, stage=2))
    recipe = recipe_of(MODELS[name], pipeline=pipeline)
    compare(recipe, mesh, 1e-4)
    found = []
    for devices in (mesh, make_mesh(devices=jax.devices()[:1])):
        state = init_state(recipe, 0, devices)
        step, numbers = jit_step(recipe, devices), []
        for index in range(5):
            state, metrics = step(state, make_batch(index, ROWS))
            numbers.append(
                [float(metrics[key][0] / metrics[key][1]) for key in ("loss", "grad_norm")]
            )
        found.append(numbers)
        if devices is mesh:
            kernel = state.params["stack"]["pattern"]["blocks_0"]["mlp"]["layer"]["up"]["kernel"]
            assert kernel.addressable_shards[0].data.shape == (2, 16, kernel.shape[-1] // 2)
            table = state.params["embed"]["table"]
            assert table.addressable_shards[0].data.shape == (VOCAB_SIZE // 4, 16)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, changes",
    [
        (MeshShape(data=2, sequence=2, stage=2), dict(context_parallel="ulysses")),
        (MeshShape(data=2, sequence=2, stage=2), dict(context_parallel="ring")),
        (MeshShape(data=2, tensor=2, stage=2), dict(sequence_parallel=True)),
    ],
)
def test_stages_that_divide_places_equal_one_device(mesh, changes):
    recipe = recipe_of(MODELS["llama"], pipeline=GPIPE, **changes)
    compare(recipe, make_mesh(mesh), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat, micro_batches", [("none", 2), ("dots", 1), ("full", 2)])
def test_composes(remat, micro_batches):
    """With accumulation and rematerialisation, beside one device without them."""
    recipe = recipe_of(MODELS["gpt2"], pipeline=INTERLEAVED)
    params, batch = random_params(recipe.model), make_batch(1, ROWS)
    ours = on_mesh(replace(recipe, remat=remat, micro_batches=micro_batches), stages_alone(2))(
        params, batch, KEY
    )
    assert_equal(ours, single(recipe, params, batch), 1e-5)


@pytest.mark.slow
def test_encoder_decoders_and_recurrences():
    """T5, whose relative bias all layers share and whose decoder reads the encoder; Mamba."""
    t5 = T5.build(**T5.tiny | dict(vocab_size=VOCAB_SIZE, num_layers=4))
    batch = make_batch(1, ROWS)
    source = make_batch(2, ROWS)
    batch = batch.replace(source=source.tokens, source_segments=source.segments)
    compare(recipe_of(t5, pipeline=GPIPE), stages_alone(2), 1e-5, batch)
    mamba = MAMBA.build(**MAMBA.tiny | dict(vocab_size=VOCAB_SIZE, num_layers=4))
    compare(recipe_of(mamba, pipeline=INTERLEAVED), stages_alone(2), 1e-5)


@pytest.mark.slow
def test_validation_equals_one_device():
    recipe = recipe_of(MODELS["gpt2"], pipeline=GPIPE)
    params, batch = random_params(recipe.model), make_batch(1, ROWS)
    mesh = stages_alone(2)
    laid_out = jax.device_put(params, state_shardings(recipe, mesh, abstract_state(recipe)).params)
    ours = jit_evaluate(mesh)(recipe, laid_out, jax.device_put(batch, batch_sharding(mesh)))
    theirs = jax.jit(evaluate_batch, static_argnums=0)(recipe, params, batch)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_dropout_follows_micro_batch_and_layers():
    """Four runs of layers draw the same whether on four stages or twice on two, and do draw."""
    model = gpt2(**SIZES, dropout=0.3)
    params, batch = random_params(model), make_batch(1, ROWS)
    four = on_mesh(recipe_of(model, pipeline=GPIPE), stages_alone(4))(params, batch, KEY)
    two = on_mesh(recipe_of(model, pipeline=INTERLEAVED), stages_alone(2))(params, batch, KEY)
    assert_equal(two, four, 1e-5)
    without = single(recipe_of(MODELS["gpt2"]), params, batch)
    assert abs(float(without[1]["loss"][0] - four[1]["loss"][0])) > 1


@pytest.mark.slow
def test_a_run_on_stages(tmp_path):
    """The same losses as on one device, and a plan that says what the pipeline costs."""
    model = tiny_model(vocab_size=12)
    losses = {}
    for name, mesh in {"one": MeshShape(data=8), "stages": MeshShape(data=4, stage=2)}.items():
        toy = replace(toy_experiment(steps=6, eval_every=3, batch_size=16), model=model, mesh=mesh)
        lines = []
        train(toy, tmp_path / name, echo=lines.append, progress=False)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [[r.get("loss"), r.get("validation_loss")] for r in records]
        assert ("2 stages, 4 micro-batches in 5 ticks, 20.0% of them idle" in "\n".join(lines)) == (
            name == "stages"
        )
    np.testing.assert_allclose(
        np.array(losses["one"], float), np.array(losses["stages"], float), rtol=1e-5
    )


# --- what is executed ------------------------------------------------------------------------


def scans(jaxpr):
    """Yields (length, primitives of its body) of every scan in a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    if equation.primitive.name == "scan":
                        yield equation.params["length"], [e.primitive.name for e in inner.eqns]
                    yield from scans(inner)


@pytest.mark.parametrize("pipeline, ticks", [(GPIPE, 4 + 3), (Pipeline(8, 2), 2 * 8 + 3)])
def test_it_takes_as_many_ticks_as_the_schedule(pipeline, ticks):
    """One scan forwards and one backwards, each sending once a tick; nothing else is sent so."""
    recipe = recipe_of(gpt2(**SIZES | dict(num_layers=8)), pipeline=pipeline)
    params, batch = P.abstract(recipe.model), make_batch(1, ROWS)
    traced = on_mesh(recipe, stages_alone(4)).trace(params, batch, KEY)
    lengths = [length for length, names in scans(traced.jaxpr.jaxpr) if "ppermute" in names]
    assert lengths == [ticks, ticks]


@pytest.mark.slow
def test_stages_send_to_each_other():
    """The compiled program permutes activations, and gathers no layer's parameters (GPipe)."""
    recipe = recipe_of(MODELS["gpt2"], pipeline=GPIPE)
    params, batch = P.abstract(recipe.model), make_batch(1, ROWS)
    text = on_mesh(recipe, stages_alone(2)).lower(params, batch, KEY).compile().as_text()
    assert re.search(r"collective-permute(-start)?\(", text)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert not [shape for shape in gathered if shape.startswith(("4,", "2,2,", "2,1,2,"))], gathered


# --- refusals --------------------------------------------------------------------------------


def test_sizes_that_do_not_divide():
    batch = make_batch(1, ROWS)
    with pytest.raises(ValueError, match=r"has 4 along 'layers', which stage=3 devices do not"):
        on_mesh(recipe_of(gpt2(**SIZES | dict(vocab_size=18))), stages_alone(3))
    recipe = recipe_of(MODELS["gpt2"], pipeline=Pipeline(4, chunks=3))
    params = P.abstract(recipe.model)
    with pytest.raises(ValueError, match="4 repeats of the stack do not divide over 2 stages of 3"):
        on_mesh(recipe, stages_alone(2)).trace(params, batch, KEY)
    recipe = recipe_of(MODELS["gpt2"], pipeline=Pipeline(5))
    with pytest.raises(ValueError, match="16 rows do not divide into 5 micro-batches"):
        on_mesh(recipe, stages_alone(2)).trace(params, batch, KEY)
    with pytest.raises(ValueError, match="chunks of a pipeline is 1 or more, not 0"):
        TrainConfig(1, 1, pipeline=Pipeline(chunks=0))


def call(model, ctx):
    """Traces a model under a mesh of two stages."""
    tokens = jnp.ones((4, 8), jnp.int32)
    params = P.abstract(model)
    with jax.sharding.use_abstract_mesh(stages_alone(2).abstract_mesh):
        return jax.eval_shape(lambda p: model.apply({"params": p}, tokens, ctx), params)


def test_what_stages_do_not_do():
    """Decode, and blocks that are not among the repeats."""
    ctx = recipe_of(MODELS["gpt2"]).context(deterministic=True)
    with pytest.raises(ValueError, match="a pipeline is for training: decode without a mesh"):
        call(MODELS["gpt2"], ctx.replace(cache_length=8))
    stack = MODELS["gpt2"].stack
    block = stack.pattern.blocks[0]
    uneven = MODELS["gpt2"].clone(stack=Stack((block,), 2, norm=LayerNorm(), prefix=(block,) * 2))
    with pytest.raises(ValueError, match="2 blocks before or after its repeats"):
        call(uneven, ctx)
