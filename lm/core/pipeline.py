"""Pipelines over the stages of a mesh: which stage computes what, and when."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Pipeline:
    """How a batch passes through layers that lie on several stages.

    Attributes:
      micro_batches: parts of the rows that follow each other through the stages; None is as many as
        divide them, up to 4 for each stage, from where on idle stages cost little (Huang et al.,
        2019).
      chunks: how many runs of consecutive layers a stage has. With 1 the schedule is GPipe's (Huang
        et al., 2019); with more it is interleaved, and stages idle less and send more (Narayanan et
        al., 2021).
    """

    micro_batches: int | None = None
    chunks: int = 1

    def __post_init__(self) -> None:
        for name in ("micro_batches", "chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of a pipeline is 1 or more, not {value}")

    def over(self, stages: int, rows: int, shards: int = 1) -> "Schedule":
        """Returns the schedule of a batch.

        Args:
          stages: over which the layers are divided.
          rows: of the batch.
          shards: over how many devices the rows are divided.

        Raises:
          ValueError: if the rows do not divide into micro-batches that divide over the devices, or
            these into groups of one for each stage, where the schedule is interleaved.
        """
        parts = self.micro_batches or math.gcd(rows // shards, 4 * stages)
        if rows % (parts * shards):
            raise ValueError(
                f"{rows} rows do not divide into {parts} micro-batches of the pipeline over "
                f"{shards} devices: choose another train.pipeline.micro_batches or batch size"
            )
        if self.chunks > 1 and parts % stages:
            raise ValueError(
                f"an interleaved pipeline takes its micro-batches in groups of one for each of "
                f"{stages} stages, and {parts} are no multiple of that: choose another "
                "train.pipeline.micro_batches, or train.pipeline.chunks 1"
            )
        return Schedule(stages, parts, self.chunks)


GPIPE = Pipeline()


@dataclass(frozen=True)
class Schedule:
    """Which stage computes which chunk of layers of which micro-batch at which tick.

    Chunk c of stage s is run c * stages + s of the layers. Micro-batches come in groups of one for
    each stage, and a group passes through all chunks before the next one enters. So what a stage
    computes is always what the stage before it, in a ring, computed one tick ago, and nothing waits
    in a buffer. With one chunk that is GPipe.

    Attributes:
      stages: p.
      micro_batches: m, a multiple of p unless there is one chunk.
      chunks: v.
    """

    stages: int
    micro_batches: int
    chunks: int = 1

    @property
    def num_ticks(self) -> int:
        """Ticks until the last stage has computed the last chunk of the last micro-batch."""
        return self.micro_batches * self.chunks + self.stages - 1

    def job(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """Returns whether a stage is busy at a tick, and the micro-batch and chunk it computes.

        Args:
          tick, stage: integers, or integer arrays, as are then the results.
        """
        number = tick - stage  # Of the stage's jobs, from 0.
        group, within = number // (self.stages * self.chunks), number % (self.stages * self.chunks)
        busy = (number >= 0) & (number < self.micro_batches * self.chunks)
        return busy, group * self.stages + within % self.stages, within // self.stages

    def table(self) -> list[list[tuple[int, int] | None]]:
        """Returns, for each tick, what each stage computes: (micro-batch, chunk), or None."""
        jobs = [
            [self.job(tick, stage) for stage in range(self.stages)]
            for tick in range(self.num_ticks)
        ]
        return [[(micro, chunk) if busy else None for busy, micro, chunk in row] for row in jobs]

    def bubble(self) -> Fraction:
        """Returns which part of all stages' ticks is idle, counted in the table."""
        cells = [cell for row in self.table() for cell in row]
        return Fraction(cells.count(None), len(cells))

    def __str__(self) -> str:
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        return (
            f"{self.stages} stages{chunks}, {self.micro_batches} micro-batches in "
            f"{self.num_ticks} ticks, {float(self.bubble()):.1%} of them idle"
        )
