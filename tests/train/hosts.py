"""Jobs of several processes on this machine, for tests: real ones, two CPU devices each."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

from lm.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENT = """
from lm.data.corpus import TextData
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment():
    return Experiment(
        name="tiny",
        model=teeny_gpt(
            vocab_size=29, max_length=32, num_features=16, num_heads=4, num_layers=1,
            mlp_multiplier=2, dropout=0.1,
        ),
        data=TextData("text:{text}", "teeny_gpt", length=16),
        optimizer=AdamW(Cosine(1e-2)),
        train=TrainConfig(steps=6, batch_size=8, eval_every=3, checkpoint_every=2, log_every=1),
    )
"""


def write_experiment(folder: pathlib.Path) -> pathlib.Path:
    """Writes a tiny experiment and its text; returns the experiment's file."""
    rng = np.random.default_rng(0)
    words = np.array(["police", "fire", "mayor", "city", "vote", "storm", "game", "win"])
    lines = [" ".join(rng.choice(words, rng.integers(2, 6))) + f" {i:b}" for i in range(120)]
    text = "\n".join(line.replace("0", "a").replace("1", "b") for line in lines)
    (folder / "text.txt").write_text(text)
    (folder / "tiny.py").write_text(EXPERIMENT.format(text=folder / "text.txt"))
    return folder / "tiny.py"


def environment(**changes: str) -> dict[str, str]:
    """The variables of a process on CPU that compiles little."""
    own = {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    return os.environ | own | changes


def start(*words: str | os.PathLike, tree: pathlib.Path = ROOT, **changes: str) -> subprocess.Popen:
    """Starts an `lm` command of the package in a tree; its output is one stream of text."""
    return subprocess.Popen(
        [sys.executable, "-m", "lm.cli", *map(str, words)],
        env=environment(PYTHONPATH=str(tree), **changes),
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(
    experiment: pathlib.Path,
    run_dir: pathlib.Path,
    processes: int,
    *overrides: str,
    options: tuple[str, ...] = (),
    **changes: str,
) -> subprocess.Popen:
    """Starts `lm launch -- lm train` with two CPU devices a process."""
    counts = ("--num-processes", str(processes), "--devices-per-process", "2")
    train = ("lm", "train", experiment, "--run-dir", run_dir, *overrides)
    return start("launch", *counts, *options, "--", *train, **changes)


def finish(process: subprocess.Popen, status: int = 0, seconds: float = 300) -> str:
    """Waits for a command; returns its output, and fails if it has another status."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end within {seconds} s:\n{output}") from None
    assert process.returncode == status, f"status {process.returncode}:\n{output}"
    return output


def read_until(process: subprocess.Popen, pattern: str, seconds: float = 120) -> str:
    """Reads the lines of a command up to one that a pattern is found in; returns them."""
    assert process.stdout is not None
    lines, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        line = process.stdout.readline()
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
        assert line, "the command ended:\n" + "".join(lines)
    raise AssertionError(f"no {pattern!r} within {seconds} s:\n" + "".join(lines))


def pids(output: str) -> dict[int, int]:
    """Returns number -> pid of the processes that `lm launch` says it started."""
    return {int(n): int(pid) for n, pid in re.findall(r"(\d+) \(pid (\d+)\)", output)}


def curve(run_dir: pathlib.Path) -> dict[int, dict[str, float]]:
    """Returns step -> the numbers of metrics.jsonl that do not depend on the clock."""
    names = ("loss", "validation_loss", "grad_norm", "accuracy", "learning_rate")
    return {
        record["step"]: {name: record[name] for name in names if name in record}
        for record in read_metrics(run_dir / "metrics.jsonl")
    }


def assert_same_curve(ours: pathlib.Path, theirs: pathlib.Path, steps: int) -> None:
    """Every step once, with the same numbers to 1e-5."""
    left, right = curve(ours), curve(theirs)
    assert list(left) == list(right) == list(range(1, steps + 1))
    for step, numbers in left.items():
        assert numbers.keys() == right[step].keys()
        for name, value in numbers.items():
            np.testing.assert_allclose(value, right[step][name], atol=1e-5, rtol=1e-5)
