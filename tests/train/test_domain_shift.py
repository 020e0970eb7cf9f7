"""From headlines to articles, by the experiment itself: what a start saves and LoRA recovers."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The losses of three seeds, trained on one device as a user would."""
    folder = tmp_path_factory.mktemp("shift")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(ROOT)
    start = str(folder / "headlines")
    for words in (
        ["-m", "lm.cli", "train", "experiments/headlines.py", "--run-dir", start],
        ["experiments/domain_shift.py", str(folder), start],
    ):
        subprocess.run([sys.executable, *words], cwd=ROOT, env=env, check=True)
    rows = json.loads((folder / "losses.json").read_text())
    print(json.dumps(rows))
    assert len(rows) == 3
    return rows


@pytest.mark.ledger("B38")
def test_a_start_saves_half_the_steps(rows):
    """What 2 N steps from scratch reach, N steps from a start reach, for each of three seeds."""
    assert all(row["full"] <= row["scratch, twice the steps"] for row in rows)


@pytest.mark.xfail(reason="measured 85.5, 103.1 and 85.3 %: the claim held for one seed of three")
def test_lora_recovers_most_of_the_gain(rows):
    gains = [(row["before"] - row["lora"], row["before"] - row["full"]) for row in rows]
    assert all(full > 0 for _, full in gains)
    assert all(lora >= 0.9 * full for lora, full in gains)
