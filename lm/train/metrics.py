"""Where a run's numbers go: metrics.jsonl, TensorBoard, plots, and Weights & Biases if asked."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

Record = dict[str, Any]


class MetricsLog:
    """Lines of metrics.jsonl, one JSON object a step, mirrored to TensorBoard; of process 0 alone.

    A resumed run begins where its checkpoint ends: lines beyond it are dropped and come again, so
    every step stands there once. A line is one write, so a killed process leaves at most a last
    line that is cut, which the next one drops.
    """

    def __init__(self, run_dir: Path, step: int, name: str, wandb: str, config: Mapping):
        """Opens the log of a run that continues after `step`.

        Raises:
          ValueError: if Weights & Biases was asked for and is not installed.
        """
        self.run, self.file, self.writer = None, None, None
        if jax.process_index() > 0:
            return
        from tensorboardX import SummaryWriter

        self.run = start_wandb(wandb, name, run_dir, config) if wandb else None
        self.path = run_dir / "metrics.jsonl"
        # A run that begins anew validates its start anew, and so writes step 0 again.
        old = read_metrics(self.path) if step else []
        kept = [record for record in old if record["step"] <= step]
        replace_file(self.path, "".join(map(as_line, kept)))
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Adds the record of a step."""
        if self.file is None:
            return
        line = as_line(record).encode()
        written = os.write(self.file, line)
        if written != len(line):
            raise OSError(f"{self.path} took {written} of {len(line)} bytes: is the disk full?")
        numbers = {name: value for name, value in record.items() if name != "step"}
        for name, value in numbers.items():
            if value is not None:
                self.writer.add_scalar(name, value, record["step"])
        if self.run is not None:
            self.run.log(numbers, step=record["step"])

    def close(self) -> None:
        if self.file is None:
            return
        os.close(self.file)
        self.writer.close()
        if self.run is not None:
            self.run.finish()


def start_wandb(project: str, name: str, run_dir: Path, config: Mapping) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "the experiment logs to Weights & Biases and wandb is not installed: pip install "
            "wandb, or leave wandb empty"
        ) from error
    return wandb.init(project=project, name=name, dir=run_dir, config=dict(config), resume="allow")


def as_line(record: Record) -> str:
    """Returns a record as a line of JSON; NaN and infinity are none, and must not get here."""
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[Record]:
    """Returns the records of a metrics.jsonl, without a last line that a killed process cut."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def replace_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def plot_curves(records: list[Record], path: Path) -> None:
    """Draws loss and top-1 accuracy over steps, in training and validation, as a PNG."""
    from matplotlib.figure import Figure  # Without pyplot, a notebook keeps its own backend.

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    accuracy = next((n for r in records for n in r if n.endswith("accuracy")), "accuracy")
    for axis, name, label in zip(
        axes, ("loss", accuracy), ("loss (nats per token)", "top-1 accuracy")
    ):
        for key, style in ((name, {}), (f"validation_{name}", {"marker": "o"})):
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                axis.plot(*zip(*points), label=key.replace("_", " "), **style)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    figure.savefig(path, dpi=120)
