"""The loop: what it writes, when it stops, and that stopping it changes nothing."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

from lm.core.config import from_json, to_json
from lm.core.mesh import MeshShape
from lm.train import loop
from lm.train.checkpoint import CheckpointError, Checkpoints, load_params
from lm.train.experiment import Experiment, find_experiment, load_experiment
from lm.train.loop import TrainingError, train
from lm.train.metrics import read_metrics
from lm.train.objectives import Masked
from lm.train.optimizer import AdamW
from lm.train.plan import model_flops
from lm.train.run import Run
from lm.train.schedule import Constant
from lm.train.state import abstract_state
from lm.train.trainable import Group
from tests.train.toy import ToyData, toy_experiment

ROOT = pathlib.Path(__file__).parents[2]
NUMBERS = ("loss", "grad_norm", "learning_rate", "validation_loss", "accuracy")


def quiet(experiment: Experiment, run_dir, **kwargs) -> loop.Result:
    return train(experiment, run_dir, echo=lambda text: None, progress=False, **kwargs)


def numbers(run_dir) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [
        {name: record[name] for name in ("step", *NUMBERS) if name in record}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def params_of(experiment: Experiment, run_dir, step: int):
    shapes = abstract_state(experiment.recipe()).params
    return load_params(run_dir / "checkpoints", shapes, step)[0]


def assert_same_run(experiment: Experiment, ours, theirs) -> None:
    """Losses and parameters, bit for bit, and each step once."""
    assert numbers(ours) == numbers(theirs)
    assert [r["step"] for r in numbers(ours)] == list(range(1, experiment.train.steps + 1))
    jax.tree.map(
        np.testing.assert_array_equal,
        params_of(experiment, ours, experiment.train.steps),
        params_of(experiment, theirs, experiment.train.steps),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    lines: list[str] = []
    result = train(toy_experiment(), run_dir, echo=lines.append, progress=False)
    return run_dir, result, lines


def test_what_a_run_writes(finished):
    run_dir, result, _ = finished
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 21))
    expected = {
        "step",
        "loss",
        "accuracy",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu",
    }
    for record in records:
        validated = (
            {"validation_loss", "validation_accuracy"} if record["step"] % 10 == 0 else set()
        )
        first = {"seconds_to_first_step"} if record["step"] == 1 else set()
        assert record.keys() == expected | validated | first
        assert all(np.isfinite(value) for value in record.values())
        assert record["tokens_per_second"] > 0 and record["mfu"] > 0
    assert result.step == 20 and result.stopped == "finished"
    assert result.best_loss == min(r["validation_loss"] for r in records if "validation_loss" in r)
    assert result.last == records[-1] and records[-1]["loss"] < records[0]["loss"]
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").iterdir())
    assert Checkpoints(run_dir / "checkpoints").latest() == 20
    config = json.loads((run_dir / "config.json").read_text())
    assert config["data"] == "toy" and "jax" in config["versions"]
    experiment = toy_experiment()
    assert from_json(config["experiment"]["model"]) == experiment.model
    assert from_json(config["experiment"]["train"]) == experiment.train
    assert config["experiment"] == json.loads(json.dumps(to_json(experiment)))


def test_the_plan_comes_first(finished):
    _, _, lines = finished
    assert "5,067 trained, 0 frozen" in lines[0]
    for name in ("memory", "tokens per step", "FLOPs per step", "devices", "run directory"):
        assert name in lines[0]
    assert re.search("attention +reference \\(causal, documents\\)\n", lines[0])
    assert re.search(r"batch +8 rows of 12 in 1 parts \(train.micro_batches changes it\)", lines[0])
    assert re.search(r"step compiled in +\d+\.\d s", lines[0])
    assert re.fullmatch(r"first step after \d+\.\d s", lines[1])
    assert lines[2].startswith("step      1")


def test_flops_are_six_per_weight_and_token_and_attention():
    experiment = toy_experiment()
    params = abstract_state(experiment.recipe()).params
    D, F, V, L, NH, B, T = 16, 32, 11, 2, 16, 8, 12
    matrices = L * (4 * D * NH + 2 * D * F) + D * V
    attention = 12 * L * NH * T
    assert model_flops(params, {}, B, T) == B * T * (6 * matrices + attention)
    assert model_flops({}, params, B, T) == B * T * (4 * matrices + attention)


def test_running_again_changes_nothing(finished):
    run_dir, result, _ = finished
    before = (run_dir / "metrics.jsonl").read_text()
    again = quiet(toy_experiment(), run_dir)
    assert (again.step, again.best_loss) == (20, result.best_loss)
    assert (run_dir / "metrics.jsonl").read_text() == before


@pytest.mark.ledger("D08")
def test_stopped_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch):
    """A Ctrl-C after step 7 (no step to save at), then the rest: bit for bit the same."""
    experiment = toy_experiment()
    take_step = Run.take_step

    def interrupt(self, batch):
        metrics = take_step(self, batch)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(Run, "take_step", interrupt)
    first = quiet(experiment, tmp_path / "run")
    monkeypatch.undo()
    assert (first.stopped, first.step) == ("SIGINT", 7)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 7
    second = quiet(experiment, tmp_path / "run")
    assert second.stopped == "finished"
    assert_same_run(experiment, tmp_path / "run", finished[0])


def test_crashed_between_checkpoints_equals_uninterrupted(finished, tmp_path, monkeypatch):
    """After an exception at step 13 it goes on from 10, and lines 11 and 12 are written anew."""
    experiment = toy_experiment()
    take_step = Run.take_step

    def crash(self, batch):
        if self.step == 13:
            raise RuntimeError("crash")
        return take_step(self, batch)

    monkeypatch.setattr(Run, "take_step", crash)
    with pytest.raises(RuntimeError, match="crash"):
        quiet(experiment, tmp_path / "run")
    monkeypatch.undo()
    assert [r["step"] for r in numbers(tmp_path / "run")][-1] == 12
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')  # As if killed in the middle of a line.
    quiet(experiment, tmp_path / "run")
    assert_same_run(experiment, tmp_path / "run", finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["pmap", "fsdp", "padded", "padded first"])
def test_resumes_on_other_devices(finished, tmp_path, change, monkeypatch):
    """Saved on one mesh, resumed on another, or under pmap: the same losses but for rounding.

    A tensor axis of 2 pads the vocabulary of 11, and a checkpoint does not know of it.
    """
    experiment = toy_experiment()
    padded = replace(experiment, mesh=MeshShape(data=2, fsdp=2, tensor=2))
    if change == "pmap":
        other = replace(experiment, train=replace(experiment.train, parallel="pmap"))
        experiment = replace(experiment, model=toy_experiment().model)
    elif change == "fsdp":
        other = replace(experiment, mesh=MeshShape(data=2, fsdp=4))
    else:
        other = padded
    if change == "padded first":
        experiment, other = other, experiment
    take_step = Run.take_step

    def stop(self, batch):
        if self.step == 10:
            raise KeyboardInterrupt
        return take_step(self, batch)

    monkeypatch.setattr(Run, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        quiet(experiment, tmp_path / "run")
    monkeypatch.undo()
    assert quiet(other, tmp_path / "run").step == 20
    ours, theirs = numbers(tmp_path / "run"), numbers(finished[0])
    # Under pmap each device draws its own dropout.
    tolerance = 0.2 if change == "pmap" else 1e-3
    np.testing.assert_allclose(
        [r["loss"] for r in ours], [r["loss"] for r in theirs], atol=tolerance
    )


def test_another_config_is_refused(finished):
    run_dir, _, _ = finished
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    other = toy_experiment(batch_size=16)
    other = replace(other, optimizer=AdamW(Constant(1.0)))
    message = r"train.batch_size is 8 there and 16 here"
    with pytest.raises(ValueError, match=message) as caught:
        quiet(other, run_dir)
    assert "optimizer.learning_rate.class" in str(caught.value)
    with pytest.raises(ValueError, match=r"data.length is 12 there and 11 here"):
        quiet(replace(toy_experiment(), data=ToyData(length=11)), run_dir)
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_checkpoints_of_another_run_are_refused(finished, tmp_path):
    """A directory of checkpoints given by itself has its config in it."""
    where = finished[0] / "checkpoints"
    other = toy_experiment(batch_size=16)
    with pytest.raises(ValueError, match=r"checkpoints belongs to .*batch_size is 8 there and 16"):
        quiet(other, tmp_path / "run", checkpoint_dir=where)
    assert not (tmp_path / "run").exists()
    assert quiet(toy_experiment(), tmp_path / "run", checkpoint_dir=where).step == 20


def test_a_masked_batch_without_a_mask_stops_the_run(tmp_path):
    experiment = replace(toy_experiment(), objective=Masked(0, rate=0.0))
    with pytest.raises(TrainingError, match="no token of the batch of step 1 counted"):
        quiet(experiment, tmp_path / "run")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(batch_size=12), "12 rows does not divide .* multiple of 8"),
        (dict(micro_batches=3), "multiple of 24"),
        (dict(steps=-1), "train.steps is 0 or more"),
        (dict(dtype="float16"), "train.dtype is one of float32, bfloat16, not 'float16'"),
        (dict(parallel="threads"), "train.parallel is one of jit, pmap"),
        (dict(attention="cudnn"), "by 'cudnn': it runs on NVIDIA GPUs, and this is a cpu"),
        (dict(keep=0), "train.keep is 1 or more"),
        (dict(remat="some"), "train.remat is one of none, dots, full, offload, not 'some'"),
    ],
)
def test_bad_settings_change_nothing(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        quiet(toy_experiment(**wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_data_changes_nothing(tmp_path):
    @dataclass(frozen=True)
    class Tokenizer:
        vocab_size: int = 12

    @dataclass(frozen=True)
    class Wide(ToyData):
        tokenizer = Tokenizer()

    for data, message in [
        (ToyData(weight=0.0), "every weight of a batch is 0"),
        (ToyData(length=17), "positions for 16 tokens"),
        (Wide(), "12 tokens and the model only 11"),
    ]:
        with pytest.raises(ValueError, match=message):
            quiet(replace(toy_experiment(), data=data), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        quiet(toy_experiment(), tmp_path / "file")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    experiment = replace(
        toy_experiment(steps=40), optimizer=AdamW(Constant(1e30), weight_decay=0.0, clip_norm=None)
    )
    with pytest.raises(TrainingError, match=r"of step \d+ is (nan|inf)") as caught:
        quiet(experiment, tmp_path / "run")
    assert "there is no checkpoint before it" in str(caught.value)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == []
    json.dumps(read_metrics(tmp_path / "run" / "metrics.jsonl"), allow_nan=False)


def test_the_last_good_checkpoint_is_named(tmp_path, monkeypatch):
    """A batch of NaN weights at step 13, after the checkpoint of step 10."""
    take_step = Run.take_step

    def poison(self, batch):
        if self.step == 12:
            batch = batch.replace(weights=batch.weights * np.float32("nan"))
        return take_step(self, batch)

    monkeypatch.setattr(Run, "take_step", poison)
    with pytest.raises(TrainingError, match=r"loss of step 13 is nan: .*checkpoints/10"):
        quiet(toy_experiment(), tmp_path / "run")


def test_early_stopping(tmp_path):
    """A rate that only does harm: the best validation is the first, and patience runs out."""
    experiment = replace(
        toy_experiment(steps=200, eval_every=5, checkpoint_every=0, patience=3, keep=1),
        optimizer=AdamW(Constant(3.0), weight_decay=0.0),
    )
    result = quiet(experiment, tmp_path / "run")
    assert result.stopped == "early stopping"
    losses = {
        r["step"]: r["validation_loss"]
        for r in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "validation_loss" in r
    }
    assert result.best_step == min(losses, key=losses.get)
    assert result.step == result.best_step + 3 * 5
    # The newest, and the best, which is older.
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [result.best_step, result.step]
    again = quiet(experiment, tmp_path / "run")
    assert (again.stopped, again.step) == ("early stopping", result.step)


def test_an_empty_validation_split(tmp_path):
    experiment = replace(toy_experiment(), data=ToyData(validation_batches=0))
    with pytest.raises(ValueError, match="validation split is empty"):
        quiet(experiment, tmp_path / "run")


def test_frozen_parameters_stay(tmp_path):
    experiment = replace(toy_experiment(), trainable=(Group("head/*"), Group("*", trains=False)))
    quiet(experiment, tmp_path / "run")
    early, late = (params_of(experiment, tmp_path / "run", step) for step in (15, 20))
    np.testing.assert_array_equal(early["embed"]["table"], late["embed"]["table"])
    assert (np.asarray(early["head"]["kernel"]) != late["head"]["kernel"]).any()


@pytest.mark.perf
def test_nothing_compiles_after_the_first_validation(tmp_path, monkeypatch):
    """Counted over the whole process by jax's own events, from step 11 to 40."""
    compiled: list[str] = []
    counting = False

    def listen(event: str, duration: float, **kwargs) -> None:
        if counting and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    take_step = Run.take_step

    def count(self, batch):
        nonlocal counting
        counting = self.step >= 11
        return take_step(self, batch)

    monkeypatch.setattr(Run, "take_step", count)
    quiet(toy_experiment(steps=40), tmp_path / "run")
    counting = True
    jax.jit(lambda x: x * 3.25)(np.ones(3)).block_until_ready()
    counting = False
    assert len(compiled) == 1, "the listener hears, and heard nothing before"


def test_metrics_are_read_one_step_late(tmp_path, monkeypatch):
    """Step n is dispatched before the metrics of step n - 1 come to the host."""
    events = []
    take_step, read = Run.take_step, loop.Loop.read
    monkeypatch.setattr(
        Run, "take_step", lambda self, b: (events.append(self.step + 1), take_step(self, b))[1]
    )
    monkeypatch.setattr(
        loop.Loop, "read", lambda self, p: (events.append(-p.step), read(self, p))[1]
    )
    quiet(toy_experiment(steps=4, eval_every=0, checkpoint_every=0), tmp_path / "run")
    assert events == [1, 2, -1, 3, -2, 4, -3, -4]


@pytest.mark.slow
def test_a_profile_is_of_the_steps_asked_for(tmp_path):
    lines: list[str] = []
    experiment = toy_experiment(steps=7, eval_every=0, checkpoint_every=0)
    train(experiment, tmp_path / "run", echo=lines.append, progress=False, profile=2)
    where = tmp_path / "run" / "profile"
    assert f"steps 4 to 5 are traced in {where}" in lines
    assert list(where.glob("plugins/profile/*/*.xplane.pb"))
    short = toy_experiment(steps=2, eval_every=0, checkpoint_every=0)
    train(short, tmp_path / "short", echo=lines.append, progress=False, profile=2)
    assert "no step was traced: the run ended within 3 steps" in lines
    with pytest.raises(ValueError, match="0 or more steps, not -1"):
        quiet(experiment, tmp_path / "never", profile=-1)
    assert not (tmp_path / "never").exists()


def test_disk_full_in_a_run(tmp_path, monkeypatch):
    """The error of a write in the background reaches the user as one sentence."""
    manager_save = Checkpoints.save

    def fail(self, state, step, meta, loss=None):
        if step == 10:
            self.wait()
            raise self._unwritten(OSError(28, "No space left on device"))
        manager_save(self, state, step, meta, loss)

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step 5 is whole"):
        quiet(toy_experiment(), tmp_path / "run")


# --- kill -9 ---------------------------------------------------------------------------------

KILLED = """
import sys
from lm.core.runtime import prepare
prepare("cpu", sys.argv[2])
from lm.train.loop import train
from tests.train.toy import toy_experiment
train(toy_experiment(steps=int(sys.argv[3]), checkpoint_every=2, eval_every=7), sys.argv[1])
"""


def start(run_dir, cache, steps: int) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(run_dir), str(cache), str(steps)],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at_random(tmp_path, num_kills: int, steps: int, seed: int) -> None:
    """Kills a run again and again, at a random time after it began to step, and compares.

    Some kills wait for a temporary directory of Orbax, to fall inside of a save.
    """
    rng = random.Random(seed)
    experiment = toy_experiment(steps=steps, checkpoint_every=2, eval_every=7)
    reference = start(tmp_path / "reference", tmp_path / "cache", steps)
    output, _ = reference.communicate()
    assert reference.returncode == 0, output
    run_dir = tmp_path / "run"
    inside = kills = 0
    while kills < num_kills:
        process = start(run_dir, tmp_path / "cache", steps)
        line = process.stdout.readline()
        while line and not line.startswith("step "):
            line = process.stdout.readline()
        if kills % 2:
            while process.poll() is None and not saving(run_dir):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.03))
        else:
            time.sleep(rng.uniform(0, 0.2))
        inside += saving(run_dir)
        alive = process.poll() is None
        process.kill()
        process.communicate()
        if not alive:
            break
        kills += 1
    assert kills == num_kills, f"the run ended after {kills} kills: give it more steps"
    assert inside > 0 or num_kills < 4
    last = start(run_dir, tmp_path / "cache", steps)
    output, _ = last.communicate()
    assert last.returncode == 0, output
    assert_same_run(experiment, run_dir, tmp_path / "reference")


def saving(run_dir) -> bool:
    return any("tmp" in path.name for path in (run_dir / "checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.ledger("D08")
def test_kill_9_changes_nothing(tmp_path):
    kill_at_random(tmp_path, num_kills=2, steps=60, seed=0)


@pytest.mark.slow
def test_kill_9_twenty_times_changes_nothing(tmp_path):
    kill_at_random(tmp_path, num_kills=20, steps=300, seed=1)


# --- experiment files ------------------------------------------------------------------------


def test_experiment_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    file = tmp_path / "experiments" / "headlines.py"
    file.write_text(
        "from tests.train.toy import toy_experiment\n\n\n"
        "def experiment():\n    return toy_experiment(steps=3)\n"
    )
    for name in ("headlines", "experiments/headlines.py", str(file)):
        assert load_experiment(name) == toy_experiment(steps=3)
    for name in ("headlnes", "experiments/headline.py"):
        with pytest.raises(ValueError, match=r"did you mean experiments/headlines.py\?"):
            find_experiment(name)
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match="no function experiment"):
        load_experiment(file)
    file.write_text("def experiment():\n    return 3\n")
    with pytest.raises(ValueError, match="returns a int, not an Experiment"):
        load_experiment(file)
