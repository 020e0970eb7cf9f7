"""What costs time and can be counted, so that noise does not blur it: `pytest -m perf`."""

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from lm.models.families.gpt2 import gpt2
from lm.models.families.teeny_gpt import teeny_gpt
from lm.models.params import abstract
from lm.train import loop
from lm.train.loop import train
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.plan import choose_micro_batches
from lm.train.run import Run
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state
from lm.train.step import train_step
from tests.train.toy import make_batch, toy_experiment

pytestmark = pytest.mark.perf
LAYERS = 3
ROOT = Path(__file__).parents[1]
# q, k, v, out, up, down, and the two products of attention.
PRODUCTS_OF_A_LAYER = 8


def quiet(experiment, run_dir) -> loop.Result:
    return train(experiment, run_dir, echo=lambda text: None, progress=False)


def reads_of_arrays(monkeypatch) -> Counter:
    """Counts, from now on, every way in which the host waits for an array on a device."""
    counts: Counter = Counter()
    array = type(jnp.zeros(()))

    def counted(owner, name):
        old = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return old(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist"):
        counted(array, name)
    counted(array, "block_until_ready")
    counted(jax, "device_get")
    counted(jax, "block_until_ready")
    return counts


def test_the_loop_waits_for_nothing_but_the_metrics_of_the_step_before(tmp_path, monkeypatch):
    """One `device_get` a step, of a few numbers, after the next step was dispatched."""
    take_step, read = Run.take_step, loop.Loop.read
    seen, events = {}, []

    def step(self, batch):
        if self.step == 5:
            seen["counts"] = reads_of_arrays(monkeypatch)
        metrics = take_step(self, batch)
        if self.step == 26:  # The steps 5 to 24 were read since.
            seen["after"] = Counter(seen["counts"])
            seen["leaves"] = len(jax.tree.leaves(metrics))
        events.append(self.step)
        return metrics

    def late(self, pending):
        events.append(-pending.step)
        return read(self, pending)

    monkeypatch.setattr(Run, "take_step", step)
    monkeypatch.setattr(loop.Loop, "read", late)
    quiet(toy_experiment(steps=30, eval_every=0, checkpoint_every=0, log_every=10), tmp_path / "r")
    assert events[:6] == [1, 2, -1, 3, -2, 4]
    after = seen["after"]
    assert after["device_get"] == 20
    assert after["__array__"] <= 20 * seen["leaves"]
    others = {name: n for name, n in after.items() if name not in ("device_get", "__array__")}
    assert not any(others.values()), others


def test_a_run_compiles_its_step_once(tmp_path, caplog):
    """And its validation once; all else together a few small programs."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        quiet(toy_experiment(steps=20), tmp_path / "run")
    text = "\n".join(record.getMessage() for record in caplog.records)
    names = Counter(re.findall(r"Compiling (?:jit\()?(\w+)", text))
    assert names["step"] == 1 and names["evaluate_batch"] == 1, names
    # Orbax cuts what lies on several devices before it saves it, in a program for each.
    assert sum(names.values()) - names["slice"] <= 12, names


STEPS_AND_MEMORY = """
import dataclasses, tempfile
from pathlib import Path
from lm.core.runtime import prepare
prepare("cpu")
import jax
from lm.models.families.gpt2 import gpt2
from lm.train.run import Run
from tests.train.toy import ToyData, toy_experiment

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

model = gpt2(vocab_size=11, max_length=64, num_features=128, num_heads=8, num_layers=4)
toy = toy_experiment(batch_size=128, micro_batches=1)
toy = dataclasses.replace(toy, model=model, data=ToyData(length=64))
run = Run(toy, Path(tempfile.mkdtemp()))
pending = None
for _ in range(8):
    metrics = run.take_step(next(run.batches))
    if pending is not None:
        jax.device_get(pending)
    pending = metrics
print(peak(), run.plan.cost.temporary_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the heap is kept on Linux alone")
def test_the_temporaries_of_steps_take_the_same_place():
    """All that is ever resident, imports and compiling included, is little more than one step's."""
    command = [sys.executable, "-c", STEPS_AND_MEMORY]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, temporaries = map(int, done.stdout.split())
    assert temporaries > 4e8
    assert peak < 2.2 * temporaries, (peak, temporaries)


def lowered(dtype: str, **changes):
    model = gpt2(vocab_size=50, max_length=16, num_features=16, num_heads=2, num_layers=LAYERS)
    recipe = Recipe(model, Generative(), AdamW(Constant(1e-3)), dtype=dtype, **changes)
    state = abstract_state(recipe)
    return jax.jit(train_step, static_argnums=0).lower(recipe, state, make_batch(0, 4))


def test_each_product_is_computed_once_in_each_direction():
    """Itself, and the gradients of its two operands; and a sum for each bias and norm."""
    dots = re.findall(r"= \S+ dot\(", lowered("float32").compile().as_text())
    products = PRODUCTS_OF_A_LAYER * LAYERS + 1  # And the head.
    # Six biases of projections, two scales and biases of norms; those of the last norm.
    sums = 10 * LAYERS + 2
    assert len(dots) == 3 * products + sums


def test_products_of_low_precision_have_operands_of_low_precision():
    """In both directions; fp32 are the sums that make the gradients of norms, and no other."""
    text = lowered("bfloat16").as_text()
    operands = re.findall(
        r"stablehlo\.dot_general .*: \(tensor<\S+x(\w+)>, tensor<\S+x(\w+)>\)", text
    )
    counts = Counter(operands)
    assert counts.keys() == {("bf16", "bf16"), ("f32", "f32")}
    products = PRODUCTS_OF_A_LAYER * LAYERS + 1
    assert counts["f32", "f32"] <= 4 * LAYERS + 2
    assert counts["bf16", "bf16"] >= 3 * products / LAYERS


def test_an_update_is_over_stacked_leaves():
    """Twice the layers make no more operations of the optimizer, and none of them is a loop."""

    def operations(layers):
        model = gpt2(64, 32, num_features=16, num_heads=2, num_layers=layers)
        recipe = Recipe(model, Generative(), AdamW(Constant(1e-3)))
        state = abstract_state(recipe)
        transform = recipe.transform(state.params)

        def update(params, grads, opt_state):
            updates, opt_state = transform.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        compiled = jax.jit(update, donate_argnums=(0, 2)).lower(
            state.params, state.params, state.opt_state
        )
        counts = re.findall(r" = \S+ ([\w-]+)\(", compiled.compile().as_text())
        return Counter(counts), len(jax.tree.leaves(state.params))

    few, leaves = operations(2)
    many, _ = operations(4)
    assert few == many and few["while"] == 0
    # Of each leaf: its squares, two steps of their sum, clipping, two moments, the new value.
    assert few["fusion"] <= 7 * leaves


def test_micro_batches_are_chosen_for_the_cache_of_a_cpu(monkeypatch):
    """The published teenyGPT in parts of 1,024 places; a model of many parameters in one part."""

    def chosen(model, rows, length):
        return choose_micro_batches(abstract(model), rows, rows * length)

    assert chosen(teeny_gpt(), 64, 128) == 8
    assert chosen(teeny_gpt(num_features=128, num_heads=2, mlp_multiplier=4), 16, 128) == 1
    assert chosen(gpt2(vocab_size=65, num_features=384, num_heads=6, num_layers=6), 16, 256) == 2
    assert chosen(gpt2(), 4, 512) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen(teeny_gpt(), 64, 128) == 1
