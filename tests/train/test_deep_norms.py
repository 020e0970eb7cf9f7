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
@pytest.mark.ledger("P094")
def test_only_norms_before_the_layers_train_without_warm_up(tmp_path):
    """Three seeds: with norms after them a deep model begins to learn, and falls back to chance."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    file = tmp_path / "losses.json"
    words = [sys.executable, "experiments/deep_norms.py", str(file)]
    subprocess.run(words, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, check=True)
    rows = json.loads(file.read_text())
    chance = math.log(10)
    assert len(rows) == 3 and file.with_suffix(".png").stat().st_size > 0
    for row in rows:
        assert row["pre"][-1] < 0.5
        assert row["post, shallow"][-1] < 0.5
        # It learns, diverges, and does not come back.
        assert min(row["post"]) < chance - 0.05
        assert not min(row["post"][-4:]) < chance - 0.02  # NaN is no less, either.
