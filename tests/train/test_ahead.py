"""Plans for chips that are not there: the arithmetic, refusals, and TPU's own compiler."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from lm.cli import main
from lm.train.ahead import plan_ahead, too_large_or
from lm.train.chips import chip_of
from lm.train.hlo import Collective
from lm.train.plan import Cost, DoesNotFit, Plan, make_plan
from lm.train.state import Recipe, abstract_state
from tests.train.toy import toy_experiment


def chips(kind: str, count: int) -> Sequence[SimpleNamespace]:
    return [SimpleNamespace(device_kind=kind, platform="tpu")] * count


def plan_of(cost: Cost, kind: str = "TPU v4", count: int = 2) -> Plan:
    recipe: Recipe = toy_experiment().recipe()
    return make_plan(recipe, abstract_state(recipe), (4, 12), cost, {}, chips(kind, count))


def test_the_roofline_is_the_longest_of_products_traffic_and_links():
    """Of two v4 chips, 275 TFLOP/s, 1,228 GB/s and 6 links of 50 GB/s each by the data sheets."""
    sent = (Collective("all-gather", 3, 4e5), Collective("all-reduce", 2, 2e5))
    cost = Cost(temporary_bytes=10**9, argument_bytes=1_228_000, output_bytes=614_000)
    plan = plan_of(cost)
    products = plan.flops_per_step / 550e12
    assert plan.roofline == pytest.approx((products, 1.5e-6, 0), rel=1e-12)
    assert plan.mfu_bound == pytest.approx(products / 1.5e-6, rel=1e-12)
    text = plan.bounds()
    assert text["roofline"].startswith("1.5e-06 s a step") and "collectives" not in text
    # 48 tokens in 1.5 microseconds, and 86,400 seconds a day.
    assert text["at most"].endswith("32,000,000 tokens/s, 2.76e+12 tokens a day")
    assert text["fits"].startswith("1.00 GB of 34.36 GB per device: 1.2 MB of arguments")
    sending = plan_of(replace(cost, collectives=sent))
    assert sending.roofline == pytest.approx((products, 1.5e-6, 2e-6), rel=1e-12)
    text = sending.bounds()
    assert text["collectives"].startswith("3 all-gather of 0.4 MB; 2 all-reduce of 0.2 MB")
    assert text["links"].startswith("2e-06 s if all 6 of a chip are busy, 6e-06 s in rings")
    full = Cost(temporary_bytes=32 * 2**30, argument_bytes=10**6, output_bytes=10**6)
    assert plan_of(full).bounds()["DOES NOT FIT"].startswith("34.36 GB of 34.36 GB per device")


def test_nothing_is_said_of_what_is_not_known():
    assert plan_of(Cost()).roofline is None and plan_of(Cost()).bounds() == {}
    assert chip_of(jax.devices()[0]) == ("", None)
    assert chip_of(chips("TPU v5 lite", 1)[0])[0] == "TPU v5 lite"
    assert chip_of(chips("TPU v5", 1)[0])[0] == "TPU v5"


def test_refusals(monkeypatch, capsys):
    assert main(["plan", "headlines"]) == 2
    assert "--topology names the slice" in capsys.readouterr().err
    assert main(["plan", "gpt2_124m_v5e8", "--topology", "v5e:2x4", "--device", "h200"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["plan", "gpt2_124m_v5e8", "--device", "h300"]) == 2
    assert "--device is one of cpu, a100, " in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lm\[plan\]'"):
        plan_ahead(toy_experiment(), "v5e:2x2")


@pytest.mark.parametrize(
    "words",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.36G of "
        "15.75G hbm. Exceeded hbm capacity by 8.61G.\n\nTotal hbm usage",
        "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.36G) exceeds available HBM (15.75G). HLO module: jit_step.",
    ],
)
def test_a_compiler_that_finds_no_room_is_quoted_with_its_numbers(words):
    found = too_large_or(RuntimeError(f"RESOURCE_EXHAUSTED: {words}"), 8, "TPU v5 lite")
    assert isinstance(found, DoesNotFit)
    assert str(found).startswith("the step needs 24.36G of a chip's 15.75G, on 8 x TPU v5 lite")


def test_another_error_of_a_compiler_keeps_its_first_line():
    other = too_large_or(RuntimeError("INTERNAL: no such thing\nat line 3"), 8, "TPU v5 lite")
    assert not isinstance(other, DoesNotFit)
    assert str(other) == "the step does not compile for 8 x TPU v5 lite: INTERNAL: no such thing"


COMPILE = """
import dataclasses
from lm.core.mesh import MeshShape
from lm.data.random_ids import RandomIds
from lm.models.families.llama import llama
from lm.models.params import count
from lm.train.ahead import plan_ahead
from tests.train.toy import toy_experiment

model = llama(
    vocab_size=256, num_features=512, num_heads=4, num_kv_heads=2, num_layers=4, mlp_features=512
)
toy = toy_experiment()

def small(mesh, **train):
    train = dict(batch_size=8, dtype="bfloat16", attention="splash") | train
    return dataclasses.replace(
        toy, model=model, mesh=mesh, data=RandomIds(256, 256),
        train=dataclasses.replace(toy.train, **train),
    )

def show(plan):
    print(count(model), plan.num_trained, plan.cost.argument_bytes, plan.cost.output_bytes)
    print({each.kind: (each.count, each.bytes) for each in plan.cost.collectives})
    print(plan)

show(plan_ahead(small(MeshShape(data=1, fsdp=4), attention="auto"), "v5e:2x2"))
print("----")
show(plan_ahead(small(MeshShape(data=8)), "v5e:2x4"))
print("----")
show(plan_ahead(small(MeshShape(data=2, fsdp=2, tensor=2), remat="full"), "v5e:2x4"))
print("----")
show(plan_ahead(small(MeshShape(data=2, tensor=2)), "v5e:2x2"))
print("----")
show(plan_ahead(small(MeshShape(data=2, tensor=2), sequence_parallel=True), "v5e:2x2"))
print("----")
show(plan_ahead(small(MeshShape(data=1, tensor=2, stage=2)), "v5e:2x2"))
print("----")
for topology, changes in (
    ("v5e:1x3", {}), ("v5e:2x4", dict(fsdp=4)), ("v5e:2x2", dict(fsdp=4, batch_size=1 << 16))
):
    mesh = MeshShape(data=1, fsdp=changes.pop("fsdp", 1))
    try:
        plan_ahead(small(mesh, **changes), topology)
    except ValueError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_steps_are_compiled_for_chips_that_are_not_there():
    """What goes into each chip is its share of all parameters and both their moments.

    Copies of the parameters add up their gradients once: the collectives are known by that.
    """
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs: pip install libtpu")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *plans, refusals = done.stdout.split("----\n")
    for text, parts in zip(plans[:3], (4, 1, 4), strict=True):
        first = text.splitlines()[0]
        parameters, trained, read, written = map(int, first.split())
        assert parameters == trained
        # Buffers are padded to tiles, and norms to more than they are.
        assert 3 * 4 * parameters / parts <= read <= 1.15 * 3 * 4 * parameters / parts
        assert 3 * 4 * parameters / parts <= written <= 1.15 * 3 * 4 * parameters / parts
        assert "roofline" in text and "per device" in text and "splash (causal" in text
    # Gradients are added up in the precision in which they come, bf16 or fp32.
    kinds = ast.literal_eval(plans[1].splitlines()[1])
    assert set(kinds) == {"all-reduce"}
    ring = 2 * 7 / 8 * parameters
    assert 2 * ring <= kinds["all-reduce"][1] <= 1.05 * 4 * ring
    assert "4 x TPU v5 lite, compiled ahead of time, mesh: fsdp 4" in plans[0]
    assert "mesh: data 2, fsdp 2, tensor 2" in plans[2]
    assert {"all-gather", "all-reduce"} <= set(ast.literal_eval(plans[2].splitlines()[1]))
    whole, divided = (ast.literal_eval(text.splitlines()[1]) for text in plans[3:5])
    assert "reduce-scatter" not in whole and {"reduce-scatter", "all-gather"} <= set(divided)
    sums = {kind: divided.get(kind, (0, 0))[0] for kind in ("reduce-scatter", "all-reduce")}
    # Of four layers forwards and backwards: what is scattered is not summed on all devices, and
    # nothing goes from features to places.
    assert sums["reduce-scatter"] >= 2 * 2 * 4 and sums["all-reduce"] < whole["all-reduce"][0]
    assert "all-to-all" not in divided
    assert "collective-permute" in plans[5] and "splash (causal" in plans[5]
    assert "refused: 'v5e:1x3' is no TPU topology" in refusals
    assert "refused: the mesh (fsdp=4) does not divide 8 devices" in refusals
    assert "G of a chip's 15.75G, on 4 x TPU v5 lite: choose a smaller batch" in refusals
