"""What `lm launch` does with its processes: it streams their output, watches and ends them."""

import ctypes
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lm.commands.verdicts import NOTES, STALE_SECONDS, TRACE, End, Pace, hung, lost
from lm.core.beat import BEAT, Mark, read_mark

POLL_SECONDS = 0.1
# After one process is lost the others end by themselves, or are ended.
GRACE_SECONDS = 5.0
KEPT_LINES = 40


@dataclass(frozen=True)
class Limits:
    """How long a supervisor waits.

    Attributes:
      hang: seconds that no process may stand still for longer than.
      watch: seconds over which the speed of processes is compared.
    """

    hang: float = 600.0
    watch: float = 30.0


@dataclass
class Worker:
    """One process, its output and its signs of life.

    Attributes:
      rank: its number in the job.
      process: running or ended.
      log: all of its output.
      beat: the file that it writes where it stands to.
      tail: its last lines.
      ended: when it was seen to have ended, or None.
    """

    rank: int
    process: subprocess.Popen
    log: Path
    beat: Path
    tail: list[str] = field(default_factory=list)
    ended: float | None = None

    @property
    def status(self) -> int | None:
        return self.process.poll()

    @property
    def mark(self) -> Mark | None:
        return read_mark(self.beat)


class Job:
    """The processes of one host, from their start to their end."""

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[int, Mapping[str, str]],
        logs: Path,
        limits: Limits,
    ) -> None:
        """Prepares to run a command once for each rank of `variables`, with those variables."""
        self.command, self.variables = command, variables
        self.limits, self.logs, self.signals = limits, logs, 0
        self.readers: list[threading.Thread] = []
        self.workers: list[Worker] = []

    def start(self) -> None:
        """Starts all processes; ValueError if the command or the directory of logs is not there."""
        if shutil.which(self.command[0]) is None:
            raise ValueError(f"there is no command {self.command[0]!r} to start")
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            for rank, own in self.variables.items():
                self.workers.append(self.start_one(rank, own))
        except OSError as error:
            raise ValueError(f"the processes cannot be started: {error}") from error
        started = ", ".join(f"{worker.rank} (pid {worker.process.pid})" for worker in self.workers)
        say(f"started process {started}; all output is in {self.logs}")

    def start_one(self, rank: int, variables: Mapping[str, str]) -> Worker:
        beat, log = self.logs / f"beat-{rank}.json", self.logs / f"process-{rank}.log"
        beat.unlink(missing_ok=True)
        process = subprocess.Popen(
            self.command,
            env={**variables, BEAT: str(beat)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            # Ctrl-C reaches the supervisor alone, which hands it on.
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform.startswith("linux") else None,
        )
        worker = Worker(rank, process, log, beat)
        reader = threading.Thread(target=stream, args=(worker,), daemon=True)
        reader.start()
        self.readers.append(reader)
        return worker

    def run(self) -> tuple[int, str]:
        """Starts all processes and waits for them.

        Returns:
          The exit status of `lm launch`, and a clause that tells why, or ''.

        Raises:
          ValueError: as `start`.
        """
        handlers = {
            number: signal.signal(number, self.hand_on)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self.start()
            return self.watch()
        finally:
            self.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def watch(self) -> tuple[int, str]:
        pace = Pace(self.limits.watch)
        while True:
            time.sleep(POLL_SECONDS)
            self.note_ends()
            if any(not self.is_well(worker.status) for worker in self.workers):
                return self.finish_after_loss()
            if all(worker.status is not None for worker in self.workers):
                self.read_rest()
                stopped = any(worker.status != 0 for worker in self.workers)
                return (130, "") if stopped else (0, "")
            marks = {w.rank: w.mark for w in self.workers if w.status is None}
            if sentence := hung(marks, time.time(), self.limits.hang):
                return 1, f"{sentence}; all processes were ended, {self.where()}"
            if sentence := pace.look({rank: mark for rank, mark in marks.items() if mark}):
                say(sentence)

    def is_well(self, status: int | None) -> bool:
        """Whether a process runs, ended well, or stopped as it was told to."""
        told = (-signal.SIGTERM, -signal.SIGINT) if self.signals else ()
        return status in (None, 0, 130, *told)

    def finish_after_loss(self) -> tuple[int, str]:
        """Gives the other processes a moment to end too; returns as `watch`."""
        end = time.monotonic() + GRACE_SECONDS
        marks = {worker.rank: worker.mark for worker in self.workers}
        now = time.time()
        while time.monotonic() < end and any(w.status is None for w in self.workers):
            time.sleep(POLL_SECONDS)
            self.note_ends()
        alive = {worker.rank for worker in self.workers if worker.status is None}
        self.kill()
        self.read_rest()
        ends = {
            worker.rank: End(worker.status or 0, "\n".join(worker.tail), worker.ended or 0.0)
            for worker in self.workers
            if worker.rank not in alive
        }
        stale = [r for r in alive if (mark := marks[r]) and now - mark.at > STALE_SECONDS]
        rank, reason = lost(ends, stale)
        status = 2 if rank in ends and ends[rank].status == 2 else 1
        others = "" if len(self.workers) == 1 else "; the others were ended"
        at = marks.get(rank)
        step = f" at step {at.step}" if at and at.step and status == 1 else ""
        return status, f"process {rank} {reason}{step}{others}, {self.where()}"

    def where(self) -> str:
        return f"and all output is in {self.logs}"

    def note_ends(self) -> None:
        for worker in self.workers:
            if worker.ended is None and worker.status is not None:
                worker.ended = time.monotonic()

    def hand_on(self, number: int, _: object) -> None:
        """Hands a signal on to the processes; a third one ends them."""
        self.signals += 1
        for worker in self.workers:
            if worker.status is None:
                worker.process.send_signal(signal.SIGKILL if self.signals > 2 else number)

    def kill(self) -> None:
        for worker in self.workers:
            if worker.status is None:
                worker.process.kill()
        for worker in self.workers:
            worker.process.wait()

    def read_rest(self) -> None:
        for reader in self.readers:
            reader.join(timeout=5)


def say(sentence: str) -> None:
    """Prints a sentence of the supervisor."""
    print(f"lm launch: {sentence}", file=sys.stderr, flush=True)


def stream(worker: Worker) -> None:
    """Writes a process's output to its log, and shows it without traces, its number in front."""
    assert worker.process.stdout is not None
    with worker.log.open("a") as log:
        print(f"--- process {worker.rank}, started {time.ctime()}", file=log, flush=True)
        copy(worker.process.stdout, log, worker)


def copy(source: IO[str], log: IO[str], worker: Worker) -> None:
    in_traceback, after_traceback = False, False
    for line in source:
        log.write(line)
        log.flush()
        worker.tail.append(line.rstrip("\n"))
        del worker.tail[:-KEPT_LINES]
        # A traceback of Python ends with the line of the exception, which is not indented; then
        # come others, or what jax says of it.
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = after_traceback = True
        elif in_traceback:
            in_traceback = line.startswith((" ", "\n"))
        elif after_traceback and NOTES.match(line):
            continue
        elif not TRACE.match(line):
            after_traceback = False
            print(f"[{worker.rank}] {line}", end="", flush=True)


def die_with_parent() -> None:
    """Has the kernel end a process where its supervisor dies without a chance to do so."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
