"""Figure 2 of the teenyGPT post, on real headlines: curves, and what temperature does to text."""

import dataclasses
import json

import pytest

from lm.eval.samples import temperature_sweep
from lm.opening import load
from lm.train.experiment import load_experiment
from lm.train.loop import train

TEMPERATURES = (0.3, 0.7, 1.0, 1.3)
STEPS = 300


@pytest.mark.slow
def test_temperature_trades_repetition_for_nonsense(tmp_path):
    """In the mean of three seeds, words outside the corpus get more, repeated pairs fewer."""
    base = load_experiment("experiments/headlines.py")
    rate = dataclasses.replace(base.optimizer.learning_rate, decay=STEPS // 2)
    base = dataclasses.replace(
        base, optimizer=dataclasses.replace(base.optimizer, learning_rate=rate)
    )
    data = base.data.make()
    lexicon = {
        word for text in base.data.load("train") for word in fold_words(data.tokenizer, text.text)
    }
    sweeps = []
    for seed in range(3):
        settings = dataclasses.replace(base.train, seed=seed, steps=STEPS, eval_every=100)
        run_dir = tmp_path / str(seed)
        train(dataclasses.replace(base, train=settings), run_dir, progress=False)
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
