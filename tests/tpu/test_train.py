"""`lm train` itself on workers that are local processes: resumed, on two at once, without a TPU."""

import threading
from pathlib import Path

import pytest

from lm.train.experiment import load_experiment
from lm.train.loop import train
from lm.train.metrics import read_metrics
from tests.tpu.cloud import wait_for
from tests.tpu.test_flow import ready
from tpu.cli import main

STEPS = 24
TINY = f"""
from lm.data.corpus import TextData
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment():
    return Experiment(
        name="tiny",
        model=teeny_gpt(
            max_length=32, num_features=16, num_heads=2, num_layers=1, mlp_multiplier=2
        ),
        data=TextData("text:TEXT", "teeny_gpt", length=16),
        optimizer=AdamW(Cosine(1e-2)),
        train=TrainConfig(
            steps={STEPS}, batch_size=8, eval_every=0, checkpoint_every=2, log_every=1
        ),
    )
"""


@pytest.fixture
def experiment(cloud, tmp_path) -> Path:
    """A tiny experiment in the checkout, and the text that it trains on beside it."""
    lines = [f"police {n} fire {n * n} mayor {n * n * n % 89} vote" for n in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    file = tmp_path / "checkout/tiny.py"
    file.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")))
    return file


def losses(run_dir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")}


@pytest.mark.slow
def test_a_preempted_run_ends_as_if_it_had_never_stopped(cloud, capsys, tmp_path, experiment):
    """All that the second machine has of the first is the checkpoints; the losses are the same."""
    kept = tmp_path / "bucket/run"

    def preempt():
        wait_for(lambda: (kept / "8").is_dir(), 200)
        cloud.preempt("pod")

    thread = threading.Thread(target=preempt)
    thread.start()
    train_line = ["lm", "train", "tiny.py", "--checkpoint-dir", str(kept)]
    options = ["--type=v5litepod-8", "--spot", "--poll=0.2", "--platform=cpu"]
    assert main(["watch", "pod", *options, "--", *train_line]) == 0
    thread.join()
    assert len(cloud.calls("queued-resources", "create")) == 2
    ours = losses(cloud.worker("pod", 0) / "lm/runs/tiny")
    assert 8 <= min(ours) - 1 < STEPS and max(ours) == STEPS
    train(load_experiment(experiment), tmp_path / "plain", echo=lambda text: None, progress=False)
    theirs = losses(tmp_path / "plain")
    # The workers have one device each and this process has eight, which sum in another order.
    assert ours == pytest.approx({step: theirs[step] for step in ours}, abs=1e-5)


@pytest.mark.slow
def test_two_workers_train(cloud, capsys, tmp_path, experiment):
    assert main(["create", "pod", "--type=v4-16"]) == 0
    assert main(["setup", "pod"]) == 0
    assert main(["run", "pod", "--platform=cpu", "--", "lm", "train", "tiny.py"]) == 0
    out = capsys.readouterr().out
    runs = [losses(cloud.worker("pod", worker) / "lm/runs/tiny") for worker in range(2)]
    assert runs[0] == runs[1] and max(runs[0]) == STEPS
    for worker in range(2):
        assert f"[{worker}] finished at step {STEPS}" in out


@pytest.mark.slow
def test_no_tpu_is_an_error_and_not_a_cpu(cloud, capsys, tmp_path, experiment):
    ready(cloud, capsys, "v5litepod-8")
    assert main(["setup", "pod"]) == 0
    assert main(["run", "pod", "--", "lm", "train", "tiny.py"]) == 1
    out = capsys.readouterr().out
    assert "[0] lm: tpu was asked for and jax cannot start it" in out
    assert "worker 0 of pod ended with status 2" in out
    assert not (cloud.worker("pod", 0) / "lm/runs/tiny").exists()
