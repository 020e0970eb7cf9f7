"""Norms before or after the layers of a deep model, by the experiment itself."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_only_norms_before_the_layers_train_without_warm_up(tmp_path):
    """Three seeds: with norms after them a deep model stays at chance, and a shallow one learns."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    file = tmp_path / "losses.json"
    words = [sys.executable, "experiments/deep_norms.py", str(file)]
    subprocess.run(words, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, check=True)
    rows = json.loads(file.read_text())
    print(rows)
    assert len(rows) == 3
    chance = math.log(10)
    for row in rows:
        assert row["pre"] < chance - 0.5
        assert row["post, shallow"] < chance - 0.5
        assert not row["post"] < chance - 0.05  # NaN is no less, either.
