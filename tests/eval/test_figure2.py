"""Figure 2 of the teenyGPT post, on real headlines: curves, and what temperature does to text."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lm.eval.samples import temperature_sweep
from lm.opening import load
from lm.train.experiment import load_experiment

TEMPERATURES = (0.3, 0.7, 1.0, 1.3)
STEPS = 300
ROOT = pathlib.Path(__file__).parents[2]


def train_headlines(run_dir: pathlib.Path, seed: int) -> None:
    """Trains the experiment for a fraction of its steps, on one device as a user would."""
    overrides = {
        "--run-dir": run_dir,
        "--train.seed": seed,
        "--train.steps": STEPS,
        "--train.eval-every": STEPS // 3,
        "--optimizer.learning-rate.decay": STEPS // 2,
    }
    command = [sys.executable, "-m", "lm.cli", "train", "experiments/headlines.py"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [str(word) for pair in overrides.items() for word in pair]
    subprocess.run([*command, *words], cwd=ROOT, env=env, check=True)


@pytest.mark.slow
@pytest.mark.ledger("B71")
def test_temperature_trades_repetition_for_nonsense(tmp_path):
    """In the mean of three seeds, words outside the corpus get more, repeated pairs fewer."""
    experiment = load_experiment(ROOT / "experiments/headlines.py")
    tokenizer = experiment.data.make_tokenizer()
    lexicon = {
        word for text in experiment.data.load("train") for word in fold_words(tokenizer, text.text)
    }
    sweeps = []
    for seed in range(3):
        run_dir = tmp_path / str(seed)
        train_headlines(run_dir, seed)
        records = [
            json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        ]
        validated = [r for r in records if "validation_loss" in r]
        assert validated[-1]["validation_loss"] < validated[0]["validation_loss"]
        assert validated[-1]["validation_accuracy"] > validated[0]["validation_accuracy"]
        assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
        sweep = temperature_sweep(
            load(run_dir), lexicon, max_new_tokens=100, temperatures=TEMPERATURES, seed=seed
        )
        print(json.dumps({"seed": seed, "sweep": {str(t): v for t, v in sweep.items()}}))
        sweeps.append(sweep)
    unknown, repeated = (
        [sum(sweep[t][name] for sweep in sweeps) / 3 for t in TEMPERATURES]
        for name in ("out_of_lexicon", "repeated_bigrams")
    )
    assert unknown == sorted(unknown) and unknown[0] < unknown[-1]
    assert repeated == sorted(repeated, reverse=True) and repeated[0] > repeated[-1]


def fold_words(tokenizer, text: str) -> list[str]:
    return tokenizer.decode(tokenizer.encode(text)).split()
