"""The training loop: steps, validation, checkpoints, and going on where a run stopped.

Step n is dispatched before the metrics of step n - 1 are read; otherwise the loop waits for the
device only to validate and to save.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.core.beat import come_to, resume
from lm.train.agree import Vote
from lm.train.experiment import Experiment
from lm.train.metrics import MetricsLog, Record, plot_curves, read_metrics
from lm.train.preview import show_example
from lm.train.progress import Progress, Signals, Stopwatch
from lm.train.run import Run, means
from lm.train.trace import Trace

Echo = Callable[[str], None]


def silent(text: str) -> None:
    """Prints nothing."""


class TrainingError(ValueError):
    """A run that cannot go on; the message is for the user."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      run_dir: where everything lies.
      step: number of updates made.
      stopped: 'finished', 'early stopping', or the name of the signal that stopped it.
      best_step, best_loss: of the smallest validation loss, or None.
      last: the last line of metrics.jsonl.
    """

    run_dir: Path
    step: int
    stopped: str
    best_step: int | None
    best_loss: float | None
    last: Record


def train(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    checkpoint_dir: str | Path | None = None,
    params: Any = None,
    tokenizer: Any = None,
    echo: Echo = print,
    progress: bool = True,
    profile: int = 0,
) -> Result:
    """Trains an experiment, or goes on where its run directory stopped.

    Killed at any moment and called again, it ends with the same losses and parameters, bit for
    bit, as if it had never stopped. SIGTERM and Ctrl-C save first; a second Ctrl-C does not.
    A checkpoint is written every `checkpoint_every` steps, after each validation, and at the end.

    Args:
      experiment: what to train.
      run_dir: a local directory for config.json, metrics.jsonl, tensorboard, curves.png, the
        tokenizer, and checkpoints.
      checkpoint_dir: another place for the checkpoints, such as gs://bucket/run.
      params: parameters to start from instead of fresh ones, or a function that returns them; a
        resumed run has its own, and does not call it.
      tokenizer: of what the run starts from, or a function that returns it; data that name no
        tokenizer of their own take it.
      echo: prints a line or more.
      progress: whether to draw a progress bar, where the output is a terminal.
      profile: trace so many steps, after a few others, into the run directory; 0 for none.

    Raises:
      ValueError: if the experiment does not fit its data or devices, or the directory is another
        run's; then nothing was changed.
      TrainingError: if the loss or the gradient becomes NaN or infinite.
      CheckpointError: if a checkpoint cannot be written or read.
    """
    run_dir = Path(run_dir).expanduser()
    is_first = jax.process_index() == 0
    if not is_first:
        # All processes compute, and the first alone speaks and writes, but for checkpoints.
        echo, progress, profile = silent, False, 0
    trace = Trace(run_dir / "profile", profile, echo)
    run = Run(experiment, run_dir, checkpoint_dir, params, tokenizer)
    echo(f"{experiment.name}\n{run.plan}")
    if run.step == 0:
        show_example(run.first, run.data.tokenizer, echo)
    try:
        log = MetricsLog(run.run_dir, run.step, experiment.name, experiment.wandb, run.saved_config)
        try:
            with Signals() as signals, Progress(run.step, run.config.steps, progress) as bar:
                stopped = Loop(run, log, bar, signals, echo, trace).run_steps()
            run.checkpoints.wait()
        finally:
            log.close()
    finally:
        run.checkpoints.manager.close()
    come_to("the end", run.step)
    records = read_metrics(run.run_dir / "metrics.jsonl") if is_first else []
    if is_first:
        plot_curves(records, run.run_dir / "curves.png")
    echo(f"{stopped} at step {run.step}; everything is in {run.run_dir}")
    best = run.standing
    last = records[-1] if records else {}
    return Result(run.run_dir, run.step, stopped, best.best_step, best.best_loss, last)


class Pending(NamedTuple):
    """A step that was dispatched and not yet read.

    Attributes:
      step: its number.
      metrics: on the device.
      tokens: places of its batch that are not padding.
      vote: of the processes, on whether to stop.
    """

    step: int
    metrics: Mapping
    tokens: int
    vote: Any


@dataclass
class Loop:
    """The loop over the steps of a run.

    Attributes:
      run: ready to take its next step.
      log: where the numbers go.
      bar: what the user sees.
      signals: whether to stop.
      echo: prints a line.
      trace: of some of its steps.
    """

    run: Run
    log: MetricsLog
    bar: Progress
    signals: Signals
    echo: Echo
    trace: Trace

    def run_steps(self) -> str:
        """Takes the steps that are left; returns why it stopped."""
        run, config = self.run, self.run.config
        self.watch, self.tokens, self.logged_step = Stopwatch(), 0, run.step
        self.vote, self.signal = Vote(), ""
        pending: Pending | None = None
        if run.step == 0 and run.experiment.init_from and config.eval_every:
            self.begin()
        while not (stopped := self.reason_to_stop()):
            batch = next(run.batches)
            tokens = int(np.count_nonzero(batch.segments)) * jax.process_count()
            self.trace.before_step(run.step, run.state)
            come_to("the step", run.step + 1)
            metrics = run.take_step(batch)
            vote = self.vote.cast(self.signals.name)
            record = None if pending is None else self.read(pending)
            resume("its own work after the step", run.step)
            if record is not None:
                self.report(record)
            pending = Pending(run.step, metrics, tokens, vote)
            if self.validates() or due(run.step, config.checkpoint_every) or self.reason_to_stop():
                self.pause(self.read(pending))
                pending = None
        if pending is not None:
            # The signal came after the last look at it in the loop.
            self.pause(self.read(pending))
        self.trace.end(run.step, run.state)
        return stopped

    def begin(self) -> None:
        """Validates what the run starts from, so that a gain can be told from it."""
        self.watch.stop()
        values = self.run.validate()
        self.log.write({"step": 0, **{f"validation_{n}": value for n, value in values.items()}})
        self.echo(f"step      0  validation loss {values['loss']:.4f}")
        self.watch.start()

    def reason_to_stop(self) -> str:
        """Returns why not to take another step, or ''."""
        config = self.run.config
        if self.run.step >= config.steps:
            return "finished"
        if 0 < config.patience <= self.run.standing.worse:
            return "early stopping"
        return self.signals.name if jax.process_count() == 1 else self.signal

    def validates(self) -> bool:
        """Whether the step just taken is one to validate after."""
        every, step = self.run.config.eval_every, self.run.step
        return due(step, every) or (every > 0 and step == self.run.config.steps)

    def read(self, pending: Pending) -> Record:
        """Waits for the metrics of a step; returns its record.

        Raises:
          TrainingError: if its loss or gradient is not finite.
        """
        record: Record = {"step": pending.step, **means(jax.device_get(pending.metrics))}
        if "loss" not in record:
            raise TrainingError(
                f"no token of the batch of step {pending.step} counted: train on larger batches, "
                "or mask more tokens"
            )
        for name in ("loss", "grad_norm"):
            self.check_finite(pending.step, name, record[name])
        self.tokens += pending.tokens
        self.signal = self.vote.read(pending.vote)
        if self.run.began is not None:
            record["seconds_to_first_step"] = seconds = time.perf_counter() - self.run.began
            self.run.began = None
            self.echo(f"first step after {seconds:.1f} s")
        return record

    def pause(self, record: Record) -> None:
        """Validates if it is time to, logs, and saves."""
        self.watch.stop()
        come_to("validation and checkpoint", record["step"])
        loss = None
        if self.validates():
            values = self.run.validate()
            loss = values["loss"]
            self.check_finite(record["step"], "validation loss", loss)
            record |= {f"validation_{name}": value for name, value in values.items()}
            self.run.standing = self.run.standing.after(record["step"], loss)
        self.report(record)
        self.run.save(loss)
        resume("its own work after the checkpoint", record["step"])
        self.watch.start()

    def report(self, record: Record) -> None:
        """Shows the record of a step, and logs it if it is one to log."""
        step, config = record["step"], self.run.config
        if due(step, config.log_every) or "validation_loss" in record or step == config.steps:
            seconds = self.watch.lap()
            steps, self.logged_step = step - self.logged_step, step
            flops = steps * self.run.plan.flops_per_step
            record["tokens_per_second"] = self.tokens / seconds
            record["mfu"] = flops / seconds / self.run.plan.peak_flops
            self.tokens = 0
            self.log.write(record)
            self.bar.line(record, self.echo)
        self.bar.update(record)

    def check_finite(self, step: int, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        checkpoints = self.run.checkpoints
        checkpoints.wait()
        good = checkpoints.latest()
        where = (
            "there is no checkpoint before it"
            if good is None
            else f"the last good checkpoint is {checkpoints.directory / str(good)}"
        )
        raise TrainingError(
            f"the {name.replace('_', ' ')} of step {step} is {value}: {where}; lower the learning "
            "rate, warm up longer or clip harder, in a new run directory"
        )


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
