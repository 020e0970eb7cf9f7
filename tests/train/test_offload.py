"""Optimizer state and activations in the host's memory: the same numbers, and where they lie."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lm.core.mesh import MeshShape, make_mesh
from lm.train.checkpoint import Checkpoints
from lm.train.loop import train
from lm.train.metrics import read_metrics
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW, Muon
from lm.train.run import Run
from lm.train.schedule import Constant
from lm.train.state import (
    HOST,
    Recipe,
    abstract_state,
    for_devices,
    init_state,
    state_shardings,
)
from lm.train.step import jit_step
from tests.train.toy import VOCAB_SIZE, make_batch, tiny_model, toy_experiment

PLAIN = Recipe(tiny_model(vocab_size=VOCAB_SIZE + 1), Generative(), AdamW(Constant(1e-2)))
# Eight simulated devices have a host's memory of their own; before jax 0.11 XLA's CPU backend
# compiles no program with outputs there, and a recipe is tested as a CPU follows it.
HAS_HOST = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)
simulates = pytest.mark.skipif(not HAS_HOST, reason="this jax places no outputs of a CPU")
ONE = MeshShape(data=1)
EIGHT = MeshShape(data=2, fsdp=2, tensor=2)


def mesh_of(shape: MeshShape):
    return make_mesh(shape, jax.devices()[:1] if shape == ONE else None)


def five_losses(recipe: Recipe, shape: MeshShape = ONE):
    """Returns the losses of five steps, and the state after them."""
    mesh = mesh_of(shape)
    recipe = recipe if HAS_HOST else for_devices(recipe, jax.devices())
    step, state, losses = jit_step(recipe, mesh), init_state(recipe, 0, mesh), []
    for index in range(5):
        state, metrics = step(state, make_batch(index, 16))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return np.array(losses), state


@functools.cache
def plain_losses():
    return five_losses(PLAIN)[0]


def moments_of(state):
    """Returns what is no number of an optimizer's state."""
    return [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
    "changes, shape",
    [
        pytest.param(dict(offload_optimizer=True), ONE, marks=pytest.mark.slow),
        (dict(offload_optimizer=True, remat="offload", micro_batches=2), EIGHT),
        *(
            pytest.param(changes, shape, marks=pytest.mark.slow)
            for shape in (ONE, EIGHT)
            for changes in (
                dict(remat="offload"),
                dict(remat="offload", micro_batches=4),
                dict(offload_optimizer=True, micro_batches=4),
                dict(offload_optimizer=True, remat="full", micro_batches=2),
                dict(offload_optimizer=True, remat="offload"),
            )
        ),
    ],
    ids=str,
)
def test_combinations_equal_the_plain_step(changes, shape):
    """Five steps of each against one device that keeps all, and takes each batch at once."""
    losses, _ = five_losses(replace(PLAIN, **changes), shape)
    np.testing.assert_allclose(losses, plain_losses(), atol=1e-5)


@simulates
@pytest.mark.parametrize(
    "optimizer", [AdamW(Constant(1e-2)), Muon(Constant(1e-2))], ids=["adamw", "muon"]
)
def test_moments_lie_in_the_hosts_memory(optimizer):
    """Before the first step and after the fifth, with the same values bit for bit.

    Numbers such as the count of steps, and parameters, stay on the devices.
    """
    recipe = replace(PLAIN, optimizer=optimizer, offload_optimizer=True)
    losses, after = five_losses(recipe, EIGHT)
    kept_losses, kept = five_losses(replace(recipe, offload_optimizer=False), EIGHT)
    np.testing.assert_array_equal(losses, kept_losses)
    for state in (init_state(recipe, 0, mesh_of(EIGHT)), after):
        assert kinds(moments_of(state)) == {HOST}
        numbers = [leaf for leaf in jax.tree.leaves(state.opt_state) if not leaf.ndim]
        assert HOST not in kinds([state.params, state.rng, numbers]) and numbers
    # They are divided as they would be on the devices.
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(kept)):
        assert ours.addressable_shards[0].data.shape == theirs.addressable_shards[0].data.shape
    assert HOST not in kinds(kept)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, kept.opt_state)


@pytest.mark.slow
@simulates
@pytest.mark.parametrize("before, later", [(True, False), (False, True)], ids=["back", "away"])
def test_a_checkpoint_does_not_say_where_moments_lie(tmp_path, before, later):
    """Saved with and restored without, or the other way round: equal bit for bit, and laid out."""
    mesh = mesh_of(EIGHT)
    state = init_state(replace(PLAIN, offload_optimizer=before), 0, mesh)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 3, {})
    checkpoints.wait()
    recipe = replace(PLAIN, offload_optimizer=later)
    shapes = abstract_state(recipe)
    shardings = state_shardings(recipe, mesh, shapes)
    back = checkpoints.restore(
        jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        ),
        3,
    )
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, back) == shardings
    assert (HOST in kinds(back.opt_state)) == later


@pytest.mark.slow
def test_a_run_with_offloading_equals_one_without(tmp_path, monkeypatch):
    """Every loss of ten steps; and the plan says how much lies where."""
    if HAS_HOST:
        monkeypatch.setattr("lm.train.run.for_devices", lambda recipe, devices: recipe)
    lines = []

    def losses(run_dir, steps, **changes):
        experiment = toy_experiment(micro_batches=1, steps=steps, **changes)
        train(experiment, tmp_path / run_dir, echo=lines.append, progress=False)
        records = read_metrics(tmp_path / run_dir / "metrics.jsonl")
        return [record["loss"] for record in records]

    expected = losses("plain", 10)
    assert "offloaded" not in "\n".join(lines) and len(expected) == 10
    assert losses("away", 10, offload_optimizer=True, remat="offload") == pytest.approx(
        expected, abs=1e-5
    )
    size = (
        sum(4 * leaf.size for leaf in moments_of(abstract_state(toy_experiment().recipe()))) / 1e6
    )
    away = f"{size:.1f} MB of optimizer state in the hosts' memory"
    text = away if HAS_HOST else "nothing: the memory of these devices is their hosts'"
    assert f"  {text}\n" in "\n".join(lines)


@simulates
@pytest.mark.slow
def test_a_run_goes_on_with_its_moments_elsewhere(tmp_path, monkeypatch):
    """Interrupted at step 5 with them in the host's memory, and gone on without: bit for bit."""
    monkeypatch.setattr("lm.train.run.for_devices", lambda recipe, devices: recipe)
    take_step = Run.take_step

    def stop(self, batch):
        if self.step == 7:
            raise KeyboardInterrupt
        return take_step(self, batch)

    def run(run_dir, **changes):
        experiment = toy_experiment(micro_batches=1, steps=10, **changes)
        train(experiment, tmp_path / run_dir, echo=lambda _: None, progress=False)
        return [record["loss"] for record in read_metrics(tmp_path / run_dir / "metrics.jsonl")]

    expected = run("plain")
    monkeypatch.setattr(Run, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run("moved", offload_optimizer=True)
    monkeypatch.setattr(Run, "take_step", take_step)
    assert run("moved") == expected


def device_with(*memories: str, platform: str = "toaster"):
    return SimpleNamespace(
        device_kind="toaster",
        platform=platform,
        addressable_memories=lambda: [SimpleNamespace(kind=kind) for kind in memories],
    )


def test_a_cpu_keeps_all():
    """The memory of a CPU is its host's, so that an experiment runs there as it is."""
    asked = replace(PLAIN, offload_optimizer=True, remat="offload")
    assert for_devices(asked, jax.devices()) == replace(PLAIN, remat="dots")
    assert for_devices(asked, [device_with("device", HOST)]) == asked
    assert for_devices(PLAIN, [device_with("device")]) == PLAIN


def test_refusals():
    """A device without such a memory, and pmap."""
    with pytest.raises(ValueError, match=r"offload_optimizer .*'pinned_host', which a toaster"):
        device = device_with("device", "unpinned_host")
        for_devices(replace(PLAIN, offload_optimizer=True), [device])
    with pytest.raises(ValueError, match=r"remat 'offload' keeps arrays .* \(it has device\)"):
        for_devices(replace(PLAIN, remat="offload"), [device_with("device")])
    with pytest.raises(ValueError, match="pmap keeps the whole state on each device"):
        toy_experiment(offload_optimizer=True, parallel="pmap")


COMPILE = """
import dataclasses, sys
import jax
from lm.core.mesh import MeshShape, batch_sharding, make_mesh
from lm.models.families.llama import llama
from lm.models.params import count
from lm.train.ahead import plan_ahead, topology_devices
from lm.train.plan import num_bytes
from lm.train.state import abstract_state, state_shardings
from lm.train.step import jit_step
from tests.train.toy import make_batch, toy_experiment

model = llama(
    vocab_size=256, num_features=512, num_heads=4, num_kv_heads=2, num_layers=8, mlp_features=2048
)
mesh = make_mesh(MeshShape(data=1, fsdp=4), topology_devices("v5e:2x2"))
batch = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh)),
    make_batch(0, 8, 128),
)
for offload, remat, parts in ((False, "none", 1), (True, "none", 1), (True, "offload", 2)):
    toy = toy_experiment(
        dtype="bfloat16", offload_optimizer=offload, remat=remat, micro_batches=parts
    )
    experiment = dataclasses.replace(toy, model=model, mesh=MeshShape(data=1, fsdp=4))
    recipe = experiment.recipe()
    shapes = abstract_state(recipe)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes, state_shardings(recipe, mesh, shapes),
    )
    memory = jit_step(recipe, mesh, shapes).lower(state, batch).compile().memory_analysis()
    print(count(model), memory.argument_size_in_bytes, memory.host_argument_size_in_bytes,
          memory.temp_size_in_bytes, memory.host_temp_size_in_bytes)
print(plan_ahead(dataclasses.replace(experiment, train=dataclasses.replace(
    experiment.train, batch_size=8)), "v5e:2x2"))
"""


@pytest.mark.slow
def test_a_tpus_compiler_takes_the_moments_off_the_chip():
    """What goes into each of four chips is a quarter of the parameters, and no moments."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs: pip install libtpu")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    # Another process may be compiling for TPUs, too; here nobody has one to themselves.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[:3]]
    (parameters, kept, kept_away, _, _), (_, less, away, _, _), both = rows
    quarter = 4 * parameters / 4
    assert 3 * quarter <= kept <= 3.1 * quarter and kept_away == 0
    assert quarter <= less <= 1.1 * quarter and 2 * quarter <= away <= 2.1 * quarter
    # With activations there as well, and a batch in two parts.
    assert both[1:3] == (less, away) and both[4] > quarter / 2
    assert "optimizer state in the hosts' memory" in done.stdout
