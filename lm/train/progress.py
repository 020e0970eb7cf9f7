"""What a user sees and does while a run goes on: a bar, lines, signals."""

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar with loss, speed and time left on a terminal; lines of the log elsewhere."""

    def __init__(self, step: int, steps: int, show: bool = True):
        self.terminal = show and sys.stdout.isatty()
        self.bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            disable=not self.terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=step)
        self.speed = ""

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Moves the bar to a step."""
        if "tokens_per_second" in record:
            self.speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        text = f"loss {record['loss']:.4f}  {self.speed}"
        self.bar.update(self.task, completed=record["step"], description=text)

    def line(self, record: dict[str, Any], echo: Callable[[str], None]) -> None:
        """Prints a logged step, where there is no bar or it was validated."""
        validated = "validation_loss" in record
        if self.terminal and not validated:
            return
        text = f"step {record['step']:>6}  loss {record['loss']:.4f}"
        if validated:
            text += f"  validation loss {record['validation_loss']:.4f}"
        text += f"  {record['tokens_per_second']:,.0f} tokens/s"
        # The bar's console prints above the bar; `print` would tear it.
        (self.bar.console.print if self.terminal else echo)(text)


class Signals:
    """Catches SIGTERM and Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.name = ""
        self.old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            self.old = {
                number: signal.signal(number, self.receive)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        except ValueError:
            # Python allows handlers in the main thread only; elsewhere signals are not ours.
            self.old = {}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class Stopwatch:
    """Measures the time of steps, without that of validation and checkpoints."""

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, time.perf_counter()

    def stop(self) -> None:
        """Counts no time until `start`."""
        self.seconds += time.perf_counter() - (self.since or time.perf_counter())
        self.since = None

    def start(self) -> None:
        self.since = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds counted since the last lap."""
        running = self.since is not None
        self.stop()
        seconds, self.seconds = self.seconds, 0.0
        if running:
            self.start()
        return max(seconds, 1e-9)
