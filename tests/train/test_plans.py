"""The experiments that are plans alone, and their reports in docs/plans."""

import math
from pathlib import Path

import pytest

from lm.cli import main
from lm.train.ahead import batch_shapes
from lm.train.analytic import abstract_mesh, plan_device
from lm.train.experiment import load_experiment

ROOT = Path(__file__).parents[2]
WIDTH = 12288
# Name -> device, chips, published number of parameters, tokens of a step.
PLANS = {
    "gpt2_124m_v5e8": ("v5e", 8, 124_439_808, 512 * 1024),
    "llama2_7b_v5e256": ("v5e", 256, 6_738_415_616, 1024 * 4096),
    "llama3_70b_v5p256": ("v5p", 256, 70_553_706_496, 1024 * 8192),
    # 96 layers, the last norm, positions, and the table, which has 47 rows more than published.
    "gpt3_175b_v5p1024": (
        "v5p",
        1024,
        96 * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH + (50257 + 47 + 2048) * WIDTH,
        1536 * 2048,
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_of_what_they_name(name):
    """Their data need nothing on disk; by arithmetic, too, they fit."""
    device, chips, parameters, tokens = PLANS[name]
    experiment = load_experiment(ROOT / f"experiments/{name}.py")
    assert experiment.name == name and name.endswith(f"{device}{chips}")
    assert math.prod(abstract_mesh(experiment.mesh).shape.values()) == chips
    plan = plan_device(device, experiment, batch_shapes(experiment))
    assert plan.num_trained == parameters and plan.tokens_per_step == tokens
    assert plan.fits and "fits" in plan.bounds()
    report = ROOT / f"docs/plans/{name}.md"
    if report.exists():
        text = report.read_text()
        assert f"lm plan experiments/{name}.py --topology {device}:" in text
        assert f"{chips} x TPU v5" in text and "DOES NOT FIT" not in text
        for row in str(plan).splitlines():
            what, _, value = row.strip().partition("  ")
            if what in ("parameters", "tokens per step", "FLOPs per step", "batch", "remat"):
                assert value.strip().partition(", the data sheet")[0] in text, f"{report}: {what}"


def test_the_command_reckons_without_a_compiler(capsys):
    """A 7B model takes 12 bytes a parameter of arguments on one H200, an eighth of it on eight."""
    train = ["--train.batch-size", "8", "--mesh", "data=1,fsdp=1"]
    command = ["plan", str(ROOT / "experiments/llama2_7b_v5e256.py"), "--device", "h200", *train]
    assert main(command) == 0
    alone = capsys.readouterr().out
    # Parameters and two moments of 4 bytes: 80.9 GB, and 27.0 GB of gradients.
    assert "1 x h200, by the analytic model, not compiled" in alone
    assert "80.86 GB of arguments" in alone and "fits " in alone
    command[-1] = "data=1,fsdp=8"
    assert main([*command, "--largest-batch"]) == 0
    divided = capsys.readouterr().out
    assert "10.11 GB of arguments" in divided and "mesh: fsdp 8" in divided
    rows = {line.split()[0]: line for line in divided.splitlines()[-4:]}
    assert list(rows) == ["none", "dots", "full", "offload"]
    found = {name: int(row.split()[1].replace(",", "")) for name, row in rows.items()}
    assert 0 < found["none"] < found["dots"] < found["full"] == found["offload"]
    assert all(size % 8 == 0 for size in found.values())
