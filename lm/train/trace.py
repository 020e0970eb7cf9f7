"""A trace of some steps of a run, by jax's profiler: what the device did, and when."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

WARM_UP = 3  # Steps before the trace: the first ones load programs and fill caches.


class Trace:
    """Traces `num_steps` steps of a run, all of their work and none of others'.

    It waits for the device before and after, and so the loop is held up twice.
    """

    def __init__(self, directory: Path, num_steps: int, echo: Callable[[str], None]):
        """Prepares a trace.

        Args:
          directory: where it is written, for TensorBoard and xprof to read.
          num_steps: how many steps to trace; 0 for none.
          echo: prints a line.

        Raises:
          ValueError: if `num_steps` is negative.
        """
        if num_steps < 0:
            raise ValueError(f"a profile is of 0 or more steps, not {num_steps}")
        self.directory, self.num_steps, self.echo = directory, num_steps, echo
        self.first: int | None = None
        self.running = False

    def before_step(self, step: int, state: Any) -> None:
        """Starts or stops, if it is time to, with `step` updates made and `state` after them."""
        if not self.num_steps:
            return
        if self.first is None:
            self.first = step + WARM_UP
        if step == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        elif step == self.first + self.num_steps:
            self.end(step, state)

    def end(self, step: int, state: Any) -> None:
        """Stops and says where the trace is, if it runs."""
        if self.running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False
            self.echo(f"steps {self.first + 1} to {step} are traced in {self.directory}")
        elif self.num_steps and (self.first is None or step <= self.first):
            self.echo(f"no step was traced: the run ended within {WARM_UP} steps")
