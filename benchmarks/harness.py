"""Contestants against each other: interleaved blocks, one active at a time, medians of ratios.

Each contestant is a process of its own (`benchmarks.worker`) that is blocked on a pipe while
another runs. Rounds go A B C, then C B A; a ratio is of two times of one round, so that a machine
that slows down slows both.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine

ROOT = Path(__file__).parents[1]
Echo = Callable[[str], None]
Phases = Mapping[str, Mapping[str, Any]]
ONE_PHASE: Phases = {"step": {}}
# A contestant that starts with less than this free would push the others out of memory.
LEAST_FREE = 2 << 30


@dataclass(frozen=True)
class Contestant:
    """What takes part.

    Attributes:
      name: in the tables.
      make: 'module:function', which returns a `benchmarks.worker.Work`.
      options: its arguments, JSON.
      env: variables of its process.
      python: its interpreter; '' is this one.
      cores: that it may use; 0 is all of them.
      phases: of its own, or None for those of the race.
    """

    name: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    cores: int = 0
    phases: Phases | None = None


class Absent(Exception):
    """A contestant cannot take part; the message says why, and what to do."""


class Process:
    """A contestant that has been started.

    Attributes:
      contestant: whose it is.
      report: its facts, versions and seconds to import and to make.
    """

    def __init__(self, contestant: Contestant):
        """Starts it and waits until its work is made.

        Raises:
          Absent: if it cannot be.
        """
        if machine.free_bytes() < LEAST_FREE:
            raise Absent(
                f"{contestant.name} is left out: less than {LEAST_FREE >> 30} GB of memory are free"
            )
        self.contestant = contestant
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        fields = {"make": contestant.make, "options": dict(contestant.options)}
        spec = json.dumps({**fields, "cores": contestant.cores})
        command = [contestant.python or sys.executable, "-m", "benchmarks.worker", spec]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        try:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **contestant.env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
            )
        except OSError as error:
            raise Absent(f"{contestant.name} is left out: {command[0]} does not run") from error
        self.report = self.receive()

    def receive(self) -> dict[str, Any]:
        """Returns its next reply; `Absent` if it has none to give."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"failed": self.last_line()}
        if "missing" in reply:
            python = self.contestant.python or sys.executable
            raise Absent(
                f"{self.contestant.name} is left out: {python} has no {reply['missing']}; "
                "pip install -e '.[bench]', or name another interpreter with --python PEER=PATH"
            )
        if "failed" in reply:
            raise Absent(f"{self.contestant.name} is left out: it failed with {reply['failed']}")
        return reply

    def last_line(self) -> str:
        status = self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        return f"status {status}" + (f", {lines[-1]}" if lines else "")

    def run(self, count: int, phase: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the block of `count` units: its values, seconds, faults, and the load beside."""
        assert self.process.stdin is not None
        before = machine.read_ticks()
        try:
            print(
                json.dumps({"count": count, "phase": dict(phase)}),
                file=self.process.stdin,
                flush=True,
            )
        except BrokenPipeError:
            raise Absent(f"{self.contestant.name} has died: {self.last_line()}") from None
        reply = self.receive()
        after = machine.read_ticks()
        beside = machine.others(before, after, reply["cpu_seconds"], reply["seconds"])
        return {**reply, "count": count, "others": beside, "load": os.getloadavg()[0]}

    def close(self) -> None:
        """Ends it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


@dataclass
class Race:
    """What was measured.

    Attributes:
      contestants: name -> report of those that took part, the reference first.
      blocks: every timed one, in order, with 'contestant', 'phase' and 'round'.
      absent: sentences about those that did not.
    """

    contestants: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def times(
        self, name: str, phase: str, quiet: bool = False, clock: str = "seconds"
    ) -> dict[int, float]:
        """Returns round -> seconds of a unit; with `quiet` of undisturbed blocks alone.

        `clock` is 'seconds', of the wall, or 'cpu_seconds'.
        """
        return {
            block["round"]: block[clock] / block["count"]
            for block in self.blocks
            if (block["contestant"], block["phase"]) == (name, phase)
            and (not quiet or machine.is_quiet(block["others"]))
        }


def race(
    contestants: Sequence[Contestant],
    *,
    phases: Phases = ONE_PHASE,
    rounds: int = 5,
    seconds: float = 4.0,
    warm_up: int = 3,
    patience: float = 0.0,
    echo: Echo = print,
) -> Race:
    """Runs contestants against each other.

    Args:
      contestants: the first is the reference of the ratios.
      phases: name -> further arguments of `Work.run`; each contestant runs all of them in its turn.
      rounds: timed ones.
      seconds: how long a block is at least, about; a block has whole units.
      warm_up: units of each phase before the first block, the first of them timed apart; their
        values are kept, for comparing.
      patience: seconds that each turn waits, at most, for other processes to leave the cores alone.
      echo: prints a line.
    """
    done, running = Race(), []
    try:
        for contestant in contestants:
            try:
                running.append(started(contestant, phases, warm_up, done, echo))
            except Absent as error:
                done.absent.append(str(error))
                echo(str(error))
        for number in range(rounds):
            for process in list(running if number % 2 == 0 else reversed(running)):
                machine.wait_for_quiet(patience)
                try:
                    turn(process, phases, number, seconds, done, echo)
                except Absent as error:
                    done.absent.append(str(error))
                    running.remove(process)
                    echo(str(error))
    finally:
        for process in running:
            process.close()
    return done


def started(
    contestant: Contestant, phases: Phases, warm_up: int, done: Race, echo: Echo
) -> Process:
    """Returns a contestant that is warm; its report, with the first unit of each phase, is kept."""
    process = Process(contestant)
    try:
        report = {**process.report, "warm": {}}
        for phase, arguments in (contestant.phases or phases).items():
            first = process.run(1, arguments)
            more = process.run(max(1, warm_up - 1), arguments)
            report["warm"][phase] = {
                "first_seconds": first["seconds"],
                "unit_seconds": more["seconds"] / more["count"],
                "values": first["values"] + more["values"],
                "others": first["others"],
            }
            report |= {"peak_rss": more["peak_rss"], "device_peak": more["device_peak"]}
    except Absent:
        process.close()
        raise
    begun = report["make_seconds"] + next(iter(report["warm"].values()))["first_seconds"]
    report["first_seconds"] = begun
    done.contestants[contestant.name] = report
    imports = report["import_seconds"]
    echo(f"{contestant.name}: {begun:.1f} s to the first result, after {imports:.1f} s of imports")
    return process


def turn(
    process: Process, phases: Phases, number: int, seconds: float, done: Race, echo: Echo
) -> None:
    """Runs one block of each phase."""
    name = process.contestant.name
    report = done.contestants[name]
    for phase, arguments in (process.contestant.phases or phases).items():
        unit = report["warm"][phase]["unit_seconds"]
        block = process.run(max(1, round(seconds / unit)), arguments)
        report |= {"peak_rss": block["peak_rss"], "device_peak": block["device_peak"]}
        block = {**block, "contestant": name, "phase": phase, "round": number}
        block["values"] = block["values"][-1:]
        done.blocks.append(block)
        echo(
            f"round {number} {name}, {phase}: {block['seconds'] / block['count']:.4g} s "
            f"x {block['count']}, {block['others']:.2f} cores busy with others"
        )


def ratios(
    race: Race,
    phase: str,
    name: str,
    reference: str,
    quiet: bool = False,
    clock: str = "seconds",
) -> list[float]:
    """Returns how many times as fast as `name` the reference was, in each round that has both."""
    ours = race.times(reference, phase, quiet, clock)
    theirs = race.times(name, phase, quiet, clock)
    return [theirs[number] / ours[number] for number in sorted(theirs) if number in ours]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, the least and the largest of some numbers."""
    return {"median": median(values), "least": min(values), "most": max(values)}
