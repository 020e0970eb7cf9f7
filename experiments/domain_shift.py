"""From headlines to articles: what pretraining saves, and what LoRA recovers of full finetuning.

    python experiments/domain_shift.py

The published teenyGPT is trained on headlines, and then on articles of BBC News: in full, by LoRA
of rank 8 on attention (8,192 of 1,089,181 weights, 0.752 %), and from scratch for twice the steps.
`lm train experiments/domain_shift.py` is the run by LoRA alone, once the study has begun.

Not measured yet.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from lm.core.runtime import prepare
from lm.data.corpus import TextData
from lm.data.labelled import labelled_texts
from lm.models.adapters import LoRA
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW, Muon
from lm.train.schedule import Cosine, WarmupStableDecay

FOLDER = Path("runs/domain_shift")
SEEDS = (0, 1, 2)
STEPS = 100


def headlines() -> Experiment:
    """Returns the pretraining."""
    return Experiment(
        name="headlines",
        model=teeny_gpt(),
        data=TextData("headlines", "teeny_gpt", length=128, layout="fit"),
        optimizer=Muon(WarmupStableDecay(7e-3, warmup=30, decay=200), weight_decay=0.0),
        train=TrainConfig(steps=400, batch_size=16, eval_every=400, log_every=50),
    )


def experiment(folder: Path = FOLDER) -> Experiment:
    """Returns the finetuning by LoRA; the study writes what it reads and starts from."""
    return Experiment(
        name="domain_shift",
        model=teeny_gpt(),
        init_from=str(folder / "headlines"),
        adapter=LoRA(rank=8, targets=tuple(f"*/{name}/kernel" for name in ("q", "k", "v", "out"))),
        data=TextData(f"text:{folder / 'articles.jsonl'}", "teeny_gpt", length=128),
        optimizer=AdamW(Cosine(1e-2, warmup=10), weight_decay=0.0),
        train=TrainConfig(steps=STEPS, batch_size=16, eval_every=STEPS // 2, log_every=25),
    )


def finetunings(folder: Path) -> dict[str, Experiment]:
    """Returns the runs on articles by name."""
    lora = experiment(folder)
    full = replace(lora, trainable="full", optimizer=AdamW(Cosine(3e-3, warmup=10)))
    twice = replace(full.train, steps=2 * STEPS)
    return {"lora": lora, "full": full, "scratch": replace(full, init_from="", train=twice)}


def losses(run: Experiment, directory: Path, seed: int = 0) -> dict[int, float]:
    """Returns step -> validation loss of a run, which goes on where it stopped."""
    from lm.opening import start
    from lm.train.loop import train
    from lm.train.metrics import read_metrics

    run = replace(run, train=replace(run.train, seed=seed))
    if train(run, directory, **start(run)).stopped != "finished":
        raise SystemExit("the same command goes on")
    records = read_metrics(directory / "metrics.jsonl")
    return {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}


def study(folder: Path = FOLDER) -> list[dict[str, float]]:
    """Trains what is not trained yet; returns the validation losses on articles, seed by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text for pairs in labelled_texts("bbc_topics").values() for text, _ in pairs][::4]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    if not (folder / "articles.jsonl").exists():  # A file that is written anew is other data.
        (folder / "articles.jsonl").write_text("".join(lines))
    losses(headlines(), folder / "headlines")
    rows = []
    for seed in SEEDS:
        found = {
            name: losses(run, folder / f"{name}_{seed}", seed)
            for name, run in finetunings(folder).items()
        }
        rows.append(
            {
                "before": found["full"][0],
                "full, half the steps": found["full"][STEPS // 2],
                "full": found["full"][STEPS],
                "lora": found["lora"][STEPS],
                "scratch": found["scratch"][STEPS],
                "scratch, twice the steps": found["scratch"][2 * STEPS],
            }
        )
    return rows


def main(folder: Path) -> None:
    """Prints the study, and writes losses.json."""
    rows = study(folder)
    (folder / "losses.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        recovered = (row["before"] - row["lora"]) / (row["before"] - row["full"])
        print("  ".join(f"{name} {loss:.4f}" for name, loss in row.items()))
        print(f"LoRA recovers {recovered:.1%} of the gain of full finetuning")


if __name__ == "__main__":
    prepare()
    main(Path(*sys.argv[1:]) if sys.argv[1:] else FOLDER)
