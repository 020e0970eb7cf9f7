"""Training an adapter beside a quantized base: what changes, what does not, and what it costs."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from lm.core.mesh import MeshShape, make_mesh
from lm.core.paths import flatten
from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.interop.hf import save_directory
from lm.leaving import export_model, merge_model
from lm.models import adapters, quantized
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.families.llama import llama
from lm.models.kernels import kernels
from lm.opening import load
from lm.train.loop import train
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.plan import Cost, make_plan, num_bytes
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state, init_state, new_state
from lm.train.step import evaluate_batch, gradients, jit_step, train_step
from lm.train.trainable import ADAPTER, FULL, Group
from tests.models.test_adapters import randomized
from tests.train.toy import make_batch, tiny_model, toy_experiment

EVERY = LoRA(4, targets=("*/kernel",))
RECIPE = Recipe(
    tiny_model(),
    Generative(),
    AdamW(Constant(1e-2), weight_decay=0.1),
    ADAPTER,
    adapter=EVERY,
    frozen_dtype="nf4",
)
QUIET = {"echo": lambda line: None, "progress": False}
step = jax.jit(train_step, static_argnums=0)
gradient = jax.jit(gradients, static_argnums=0)
evaluate = jax.jit(evaluate_batch, static_argnums=0)


def slow(*values, **options):
    return pytest.param(*values, marks=pytest.mark.slow, **options)


@partial(jax.jit, static_argnums=0)
def start(recipe):
    key = jax.random.PRNGKey(1)
    return new_state(recipe, recipe.prepare(P.init(recipe.model, key), key), key)


@pytest.mark.parametrize("kind", [slow("int8"), slow("int4"), "nf4"])
def test_the_base_stays_bit_for_bit(kind):
    """100 steps of AdamW with decay move A and B alone; the optimizer knows of nothing else."""
    recipe = replace(RECIPE, frozen_dtype=kind)
    before = start(recipe)
    factors = {path for path in flatten(before.params) if path.endswith(("lora_a", "lora_b"))}
    held = [leaf for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in held) == 2 * P.count(
        {path: flatten(before.params)[path] for path in factors}
    )
    state = before
    for index in range(100):
        state, _ = step(recipe, state, make_batch(index, 4))
    for path, leaf in flatten(state.params).items():
        old = np.asarray(flatten(before.params)[path])
        assert (np.asarray(leaf).tobytes() == old.tobytes()) == (path not in factors), path
    losses = [evaluate(recipe, s.params, make_batch(99, 8))["loss"] for s in (before, state)]
    first, last = (float(total / weight) for total, weight in losses)
    assert last < first - 0.3


@pytest.mark.parametrize(
    "kind, remat",
    [
        slow(*pair)
        for pair in (("nf4", "none"), ("int8", "full"), ("int4", "dots"), ("nf4", "full"))
    ],
)
def test_gradients_are_those_beside_the_dequantized_base(kind, remat):
    recipe = replace(RECIPE, frozen_dtype=kind, remat=remat)
    state = start(recipe)
    params = randomized(state.params)
    grads, _ = gradient(recipe, params, make_batch(5, 4), state.rng)
    plain = quantized.dequantize(recipe.model, params)
    theirs, _ = gradient(recipe, plain, make_batch(5, 4), state.rng)
    assert {path.rpartition("/")[2] for path in flatten(grads)} == {"lora_a", "lora_b"}
    for path, leaf in flatten(grads).items():
        assert np.abs(leaf).max() > 1e-4
        np.testing.assert_allclose(leaf, flatten(theirs)[path], atol=1e-5, err_msg=path)


def compiled(recipe, batch):
    return step.lower(recipe, abstract_state(recipe), batch).compile()


@pytest.mark.slow
def test_less_work_and_memory_than_full_training():
    """4 operations for a frozen weight where full training has 6; half a byte where it has 12."""
    # One layer, since the compiler counts the operations of a scanned stack's layers once.
    model = tiny_model(num_features=128, mlp_multiplier=4, num_layers=1)
    lora = LoRA(1, targets=("*/q/kernel",))
    found = {}
    for name, table, adapter, kind in (
        ("full", FULL, None, "float32"),
        ("lora", ADAPTER, lora, "float32"),
        ("qlora", ADAPTER, lora, "nf4"),
    ):
        recipe = replace(RECIPE, model=model, trainable=table, adapter=adapter, frozen_dtype=kind)
        costs = compiled(recipe, make_batch(0, 16)).cost_analysis()
        assert costs is not None
        flops = costs["flops"]
        state = abstract_state(recipe)
        found[name] = flops, num_bytes(state.params) + num_bytes(state.opt_state)
        plan = make_plan(recipe, state, (16, 12), Cost(), {}, jax.devices())
        assert plan.num_frozen + plan.num_trained == P.count(model) + (name != "full") * P.count(
            adapters.split(state.params)[1]
        )
    assert found["qlora"][0] <= 0.75 * found["full"][0]
    # Kernels are 4 + 8 bytes a weight there, and 1/2 and 4/64 here.
    weights = sum(flatten(P.abstract(model))[path].size for path in kernels(model))
    saved = found["lora"][1] - found["qlora"][1]
    assert saved == (4 - 0.5 - 4 / 64) * weights
    assert found["qlora"][1] < found["lora"][1] / 3 < found["full"][1] / 8


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": LoRA(1, targets=("*/q/kernel",), dora=True), "remat": "full"},
        slow({"dtype": "bfloat16"}),
        slow({"remat": "dots"}),
        slow({"frozen_dtype": "int4"}),
        slow({"frozen_dtype": "int8"}),
    ],
    ids=["plain", "dora and remat", "bfloat16", "dots", "int4", "int8"],
)
def test_the_backward_pass_dequantizes_again(changes):
    """A step holds the dequantized kernels of few layers at once, and not of all 64."""
    model = llama(16, num_features=64, num_heads=4, num_layers=64, mlp_features=256, max_length=16)
    lora = LoRA(1, targets=("*/q/kernel",))
    recipe = replace(RECIPE, **{"model": model, "adapter": lora} | changes)
    temporary = compiled(recipe, make_batch(0, 1, 4)).memory_analysis().temp_size_in_bytes
    weights = sum(flatten(P.abstract(model))[path].size for path in kernels(model))
    assert temporary < 4 * weights / 4, temporary / (4 * weights)


@pytest.mark.slow
def test_on_a_mesh():
    """Codes lie divided as their kernels; eight devices give one device's numbers."""
    recipe = replace(RECIPE, model=tiny_model(vocab_size=12))
    batch = make_batch(0, 8)
    found = []
    for mesh in (make_mesh(MeshShape(), jax.devices()[:1]), make_mesh(MeshShape(2, 2, 2))):
        state = init_state(recipe, 0, mesh)
        codes = {p: leaf for p, leaf in flatten(state.params).items() if p.endswith("_nf4")}
        state, metrics = jit_step(recipe, mesh, state)(state, batch)
        found.append((jax.device_get(state.params), float(metrics["loss"][0])))
    for path, leaf in codes.items():
        own = leaf.sharding.shard_shape(leaf.shape)
        assert np.prod(own) == leaf.size / 4, path  # Over fsdp and tensor, two devices each.
    (one, one_loss), (eight, eight_loss) = found
    assert abs(one_loss - eight_loss) <= 1e-4
    for path, leaf in flatten(one).items():
        if not path.endswith("lora_a"):  # Its gradient is zero at first, B being zero.
            np.testing.assert_allclose(flatten(eight)[path], leaf, atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_a_run_that_goes_on(tmp_path):
    """Stopped and gone on, it ends in the same bytes; it opens, merges and exports."""
    model = llama(29, num_features=32, num_heads=4, num_layers=2, mlp_features=48, max_length=16)
    run, rows = tmp_path / "run", [[3, 4, 5, 6, 7]]
    experiment = toy_experiment(steps=4, checkpoint_every=2, eval_every=0, frozen_dtype="nf4")
    experiment = replace(experiment, model=model, adapter=LoRA(2))
    train(experiment, run, **QUIET)
    teeny_gpt_tokenizer().save(run)
    whole = load(run, step=4)
    for path in kernels(model):
        assert flatten(whole.params)[f"{path}_nf4"].dtype == np.uint8
    shutil.rmtree(run / "checkpoints" / "4")
    train(experiment, run, **QUIET)
    again = flatten(load(run, step=4).params)
    for path, leaf in flatten(whole.params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(again[path]).tobytes(), path

    low = load(run, step=4, dtype="bfloat16", mesh=make_mesh())
    leaves = flatten(low.params).items()
    dtypes = {path.rpartition("_")[2]: leaf.dtype.name for path, leaf in leaves}
    assert dtypes["nf4"] == "uint8" and dtypes["scales"] == "float32" and dtypes["a"] == "bfloat16"
    said = []
    for written in (
        merge_model(run, tmp_path / "merged", said.append),
        export_model(run, tmp_path / "out", "merged", echo=said.append),
    ):
        there = load(written)
        assert flatten(there.params).keys() == flatten(P.abstract(model)).keys()
        np.testing.assert_allclose(there.logits(rows), whole.logits(rows), atol=1e-5)
    assert said == ["quantized kernels are written dequantized, in fp32"] * 2
    with pytest.raises(ValueError, match="hold quantized kernels, for which this format has no"):
        save_directory(whole, tmp_path / "other")


def test_refusals(tmp_path):
    full = replace(toy_experiment(), train=replace(toy_experiment().train, frozen_dtype="nf4"))
    with pytest.raises(ValueError, match="frozen_dtype nf4 is for kernels that do not train"):
        train(full, tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="frozen_dtype is one of float32, bfloat16, int8, int4"):
        replace(toy_experiment().train, frozen_dtype="int2")
    model = RECIPE.model
    low = quantized.quantize(model, P.init(model, jax.random.key(0)), "int8")
    with pytest.raises(ValueError, match="quantized, and codes of codes"):
        RECIPE.prepare(low, jax.random.key(0))


def test_a_table_decides_by_the_path_of_the_kernel():
    """Kernels that a table freezes are quantized, the others train as they are."""
    table = (Group("*/mlp/*/kernel", trains=False), Group("embed/*", trains=False), Group("*"))
    recipe = replace(RECIPE, adapter=None, trainable=table)
    trained, frozen = recipe.split(start(recipe).params)
    low = {path for path in flatten(frozen) if "kernel" in path}
    assert low and all("/mlp/" in path and path.endswith(("nf4", "scales")) for path in low)
    assert any(path.endswith("/q/kernel") for path in flatten(trained))
