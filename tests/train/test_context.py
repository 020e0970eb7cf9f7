"""Training on meshes that divide the places of every row, against one device."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.mesh import MeshShape
from lm.core.paths import flatten
from lm.models.zoo import all_families
from lm.train import loop
from lm.train.experiment import TrainConfig
from lm.train.objectives import Generative, Masked
from lm.train.optimizer import AdamW
from lm.train.run import Run
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state, new_state, state_shardings
from lm.train.step import batch_shardings, check_lengths, gradients, jit_step
from tests.conformance.harness import random_params
from tests.ops.test_context import collectives, mesh_of
from tests.train.test_loop import numbers
from tests.train.toy import toy_experiment

VOCAB_SIZE, LAYERS, B, T = 64, 2, 4, 16
KEY = jax.random.PRNGKey(3)
MESHES = {
    "4 beside data": dict(sequence=4, data=2),
    "2 beside fsdp and tensor": dict(sequence=2, fsdp=2, tensor=2),
}


@cache
def model_of(name):
    """Returns the tiny model of a family, whose vocabulary the meshes divide."""
    family = all_families()[name]
    return family.build(**{**family.tiny, "vocab_size": VOCAB_SIZE, "num_layers": LAYERS})


@cache
def params_of(name):
    return random_params(model_of(name))


def make_batch(source=False):
    """Returns rows of several documents and some padding, with uneven weights."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(1, VOCAB_SIZE, (2, B, T)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    segments[1, 11:] = segments[2, 15:] = 0
    weights = (rng.random((B, T)) * (segments != 0)).astype(np.float32)
    batch = Batch(tokens, targets, weights, segments)
    if not source:
        return batch
    return batch.replace(
        segments=(segments != 0).astype(np.int32),
        source=rng.integers(1, VOCAB_SIZE, (B, 24)).astype(np.int32),
        source_segments=(np.arange(24) < rng.integers(9, 25, (B, 1))).astype(np.int32),
    )


def recipe_of(name, way, **changes):
    objective = Masked(mask_id=1) if name == "bert" else Generative()
    return Recipe(model_of(name), objective, AdamW(Constant(1e-3)), context_parallel=way, **changes)


def loss_and_gradients(recipe, params, batch, mesh=None):
    """Returns the sums and gradients of a batch, by name, as the train step computes them."""

    def both(params, batch):
        if mesh is None:
            return gradients(recipe, params, batch, KEY)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(recipe, params, batch, KEY)

    lie = {}
    if mesh is not None:
        shardings = state_shardings(recipe, mesh, abstract_state(recipe))
        lie = dict(in_shardings=(shardings.params, batch_shardings(mesh, batch)))
    grads, metrics = jax.jit(both, **lie)(params, batch)
    total, weight = metrics["loss"]
    return {"loss": total / weight, "weight": weight, **flatten(grads)}


@cache
def on_one_device(name, parts=1):
    recipe = recipe_of(name, "ulysses", micro_batches=parts)
    return loss_and_gradients(recipe, params_of(name), make_batch(name == "t5"))


FAST = [("gpt2", "ulysses", "4 beside data")]


def cells():
    for name in ("gpt2", "llama", "bert", "t5", "mamba"):
        for way in ("ulysses", "ring"):
            for mesh in MESHES:
                cell = name, way, mesh
                if cell in FAST:
                    yield cell
                elif name != "mamba" or way == "ring":
                    yield pytest.param(*cell, marks=pytest.mark.slow)


@pytest.mark.ledger("P041")
@pytest.mark.parametrize("name, way, mesh", list(cells()))
def test_a_step_equals_one_device(name, way, mesh):
    """Loss and every gradient to 1e-5: packed documents, padding, grouped heads, T5's bias and
    cross attention, BERT's masked loss, and a recurrence over places on several devices."""
    recipe, batch = recipe_of(name, way), make_batch(name == "t5")
    found = loss_and_gradients(recipe, params_of(name), batch, mesh_of(**MESHES[mesh]))
    for path, theirs in on_one_device(name).items():
        np.testing.assert_allclose(found[path], theirs, atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_micro_batches_and_remat_beside_it(way):
    recipe = recipe_of("llama", way, micro_batches=2, remat="dots")
    mesh = mesh_of(**MESHES["4 beside data"])
    found = loss_and_gradients(recipe, params_of("llama"), make_batch(), mesh)
    for path, theirs in on_one_device("llama", parts=2).items():
        np.testing.assert_allclose(found[path], theirs, atol=1e-5, rtol=0, err_msg=path)


def compiled_step(name, way, mesh):
    recipe = recipe_of(name, way).over(3)
    params = jax.eval_shape(lambda: params_of(name))
    state = jax.eval_shape(lambda params: new_state(recipe, params, KEY), params)
    return jit_step(recipe, mesh, state).lower(state, make_batch()).compile().as_text()


@pytest.mark.slow
@pytest.mark.ledger("P041")
@pytest.mark.perf
def test_a_step_exchanges_places_only_around_attention():
    """Four all-to-alls there and four back in each layer's mixer, and none elsewhere."""
    text = compiled_step("gpt2", "ulysses", mesh_of(**MESHES["4 beside data"]))
    lines = [line for line in text.splitlines() if re.search(r" all-to-all(-start)?\(", line)]
    assert len(lines) == 8 * LAYERS
    assert all(re.search(r'op_name="[^"]*/mixer/', line) for line in lines)
    own = B // 2 * T // 4 * 32 * 4
    assert {size for kind, size in collectives(text) if kind == "all-to-all"} == {own}


@pytest.mark.perf
@pytest.mark.slow
def test_a_step_with_a_ring_gathers_no_activations():
    """What is gathered is of whole numbers: documents and positions."""
    text = compiled_step("llama", "ring", mesh_of(**MESHES["4 beside data"]))
    gathered = re.findall(r" = (\S+) all-gather(?:-start)?\(", text)
    assert all(re.match(r"\(?(s32|pred)\[", shape) for shape in gathered), gathered
    assert " collective-permute(" in text and " all-to-all(" not in text


COMPILE_FOR_TPU = """
import re
from collections import Counter

import jax
from jax.experimental import topologies

from lm.core.batch import Batch
from lm.core.mesh import MeshShape, make_mesh
from lm.models.families.llama import llama
from lm.ops.attention import choices
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state
from lm.train.step import jit_step

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(MeshShape(data=1, sequence=4), chips)
model = llama(
    vocab_size=256, num_features=256, num_heads=4, num_kv_heads=2, num_layers=2, mlp_features=256
)
ids = jax.ShapeDtypeStruct((4, 512), "int32")
batch = Batch(ids, ids, jax.ShapeDtypeStruct((4, 512), "float32"), ids, ids)
for way in ("ulysses", "ring"):
    recipe = Recipe(
        model, Generative(), AdamW(Constant(1e-3)), dtype="bfloat16", context_parallel=way
    ).over(3)
    step, state = jit_step(recipe, mesh), abstract_state(recipe)
    with choices() as found:
        lowered = step.lower(state, batch)
    text = lowered.compile().as_text()
    print([choice.backend for choice in dict.fromkeys(found)], text.count("tpu_custom_call"))
    of_floats = re.findall(r" = .*(?:bf16|f32)\\[.* (all-to-all|all-gather)(?:-start)?\\(", text)
    print(Counter(of_floats), "collective-permute" in text)
"""


@pytest.mark.slow
def test_both_ways_compile_for_a_tpu():
    """Ahead of time, for four chips of a v5e: Ulysses around the splash kernel, forwards and twice
    backwards in the loop over layers, with its eight exchanges; a ring that gathers no floats."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs: pip install libtpu")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # Nothing here touches a chip.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "['splash'] 3",
        "Counter({'all-to-all': 8}) False",
        "['ring'] 0",
        "Counter() True",
    ]


# --- a run -----------------------------------------------------------------------------------


def run_of(experiment, run_dir):
    """Runs an experiment; returns what it prints."""
    lines = []
    loop.train(experiment, run_dir, echo=lines.append, progress=False)
    return lines


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_the_other_way(tmp_path, monkeypatch):
    """Ring over four devices, then Ulysses over two: losses and validations of plain data."""
    plain = toy_experiment(steps=10, eval_every=5)
    run_of(plain, tmp_path / "plain")
    train = replace(plain.train, context_parallel="ring")
    ring = replace(plain, mesh=MeshShape(data=2, sequence=4), train=train)
    take_step = Run.take_step

    def stop(self, batch):
        if self.step == 5:
            raise KeyboardInterrupt
        return take_step(self, batch)

    monkeypatch.setattr(Run, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_of(ring, tmp_path / "run")
    monkeypatch.undo()
    train = replace(train, context_parallel="ulysses")
    other = replace(ring, mesh=MeshShape(data=4, sequence=2), train=train)
    lines = run_of(other, tmp_path / "run")
    assert re.search(
        r"attention +reference \(causal, documents, ulysses over 2 devices\)", lines[0]
    )
    found, expected = numbers(tmp_path / "run"), numbers(tmp_path / "plain")
    assert [line["step"] for line in found] == list(range(1, 11))
    for ours, theirs in zip(found, expected):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_run_whose_rows_do_not_divide_is_refused(tmp_path):
    experiment = replace(toy_experiment(), mesh=MeshShape(data=1, sequence=8))
    with pytest.raises(ValueError, match=r"rows of 12 places do not divide .* sequence=8: choose"):
        Run(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_of_choices_are_refused():
    ids = np.ones((2, 4, 8), np.int32)
    batch = Batch(ids, ids, jnp.ones(ids.shape), ids)
    with pytest.raises(ValueError, match=r"several choices, \(2, 4, 8\).* sequence=2"):
        check_lengths(batch, mesh_of(sequence=2))
    check_lengths(batch, mesh_of(data=2))
    long = replace(make_batch(True), source=np.ones((2, 9), np.int32))
    with pytest.raises(ValueError, match="rows of 9 places"):
        check_lengths(long, mesh_of(sequence=2))


def test_a_way_that_there_is_not():
    with pytest.raises(ValueError, match="context_parallel is one of ulysses, ring, not 'rings'"):
        TrainConfig(steps=1, batch_size=1, context_parallel="rings")
