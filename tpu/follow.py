"""The logs of all workers as one, each line with its worker's number, through lost connections."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tpu import gcloud as calls
from tpu.gcloud import ATTEMPTS, Done, TpuError, Unreachable
from tpu.slice import Slice

# The worker sends a beat every 15 s; a connection that is silent for longer is dead.
SILENCE_SECONDS = 90.0
# How long the others may go on once one worker has failed.
LAG_SECONDS = 30.0
TICK_SECONDS = 0.2


@dataclass
class Ending:
    """How the run of a worker ended.

    Attributes:
      status: of the process; 128 + N if signal N killed it.
      stopped: '' or why we stopped it: 'by hand', 'with the others'.
    """

    status: int
    stopped: str = ""

    def __str__(self) -> str:
        if self.stopped:
            return f"was stopped {self.stopped}"
        if self.status == 137:
            return "was killed (status 137: out of memory, or by hand)"
        return f"ended with status {self.status}"


@dataclass
class Stream:
    """The log of one worker, followed in a thread.

    Attributes:
      slice: whose worker it is.
      worker: its number.
      lines: where (worker, line) go.
      options: of 'follow' at the first connection.
      ending: how the run ended, once it has; None too if it goes on and nobody waits for its end.
      error: why it is followed no longer.
      heard: when something last came.
    """

    slice: Slice
    worker: int
    lines: queue.Queue
    options: tuple[str, ...]
    ending: Ending | None = None
    error: TpuError | None = None
    heard: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.first: int | None = None
        self.closing = threading.Event()
        self.process = None
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.cut()

    def cut(self) -> None:
        """Ends the connection; unless the stream is closing, there will be another."""
        if self.process is not None:
            calls.end(self.process)

    def _follow(self) -> None:
        failures = 0
        while not self.closing.is_set():
            before = self.first
            done = self._connect()
            if done is None or self.closing.is_set():
                return
            failures = 0 if self.first != before else failures + 1
            if done.kind not in ("transient", ""):
                self.error = TpuError(f"worker {self.worker}: {done.reason}")
                return
            if failures >= ATTEMPTS:
                self.error = Unreachable(f"worker {self.worker}: {done.reason or 'no answer'}")
                return
            self.closing.wait(calls.PAUSE_SECONDS * 2 ** min(failures, 4))

    def _connect(self) -> Done | None:
        """Reads one connection to its end; returns None if what was to be followed is complete."""
        options = self.options if self.first is None else (f"--first={self.first}",)
        process = self.slice.gcloud.popen(self.slice.agent_line(self.worker, "follow", *options))
        self.process, self.heard = process, time.monotonic()
        assert process.stdout is not None and process.stderr is not None
        errors: list[str] = []
        stderr = process.stderr
        reader = threading.Thread(target=lambda: errors.extend(stderr), daemon=True)
        reader.start()
        complete = False
        for line in process.stdout:
            self.heard = time.monotonic()
            complete = self._take(line.rstrip("\n")) or complete
        status = process.wait()
        reader.join(2)
        return None if complete else Done(status, "", "".join(errors))

    def _take(self, line: str) -> bool:
        """Takes a line of the worker's; returns whether it is the last."""
        if line.startswith("|"):
            assert self.first is not None
            self.first += 1
            self.lines.put((self.worker, line[1:]))
        elif line.startswith("#from "):
            self.first = int(line.split()[1])
        elif line.startswith("#ended "):
            _, status, *why = line.split(maxsplit=2)
            self.ending = Ending(int(status), "".join(why))
            return True
        return line == "#running"


def follow(
    slice: Slice,
    workers: list[int],
    *options: str,
    poll: float = 0.0,
    usable: Callable[[], bool] = lambda: True,
    stop_rest: Callable[[Ending], None] | None = None,
) -> dict[int, Ending | None]:
    """Prints what the workers log until all have ended.

    Args:
      slice: whose workers they are.
      workers: their numbers.
      options: of 'follow' of tpu/worker.py.
      poll: how often to ask `usable`, in seconds; 0 for never.
      usable: whether the slice can still be used; where it cannot, following ends.
      stop_rest: called with how a worker ended if it failed and others go on after `LAG_SECONDS`.

    Returns:
      worker -> how it ended, None where that is not known: it is lost, or only asked to show what
      there is.

    Raises:
      TpuError: if a worker refuses, or cannot be reached while the slice is usable.
    """
    gcloud = slice.gcloud
    if gcloud.dry_run:
        for worker in workers:
            gcloud.run(slice.agent_line(worker, "follow", *options), timeout=0)
        return {worker: Ending(0) for worker in workers}
    lines: queue.Queue = queue.Queue()
    streams = [Stream(slice, worker, lines, options) for worker in workers]
    told: set[int] = set()
    failed_at, looked = 0.0, time.monotonic()
    try:
        while True:
            # Looked at before the lines are taken, so that none is left behind.
            alive = [stream for stream in streams if stream.thread.is_alive()]
            drain(lines, gcloud.echo)
            for stream in alive:
                if time.monotonic() - stream.heard > SILENCE_SECONDS:
                    stream.heard = time.monotonic()
                    stream.cut()
            for stream in streams:
                if stream.worker not in told and stream.ending and stream.ending.status:
                    told.add(stream.worker)
                    gcloud.echo(f"worker {stream.worker} of {slice.name} {stream.ending}")
                    failed_at = failed_at or time.monotonic()
            if not alive:
                break
            lost = any(stream.error for stream in streams)
            if poll and (lost or time.monotonic() - looked > poll):
                looked = time.monotonic()
                if not usable():
                    return {stream.worker: stream.ending for stream in streams}
            if lost:
                break
            if stop_rest and failed_at and time.monotonic() - failed_at > LAG_SECONDS:
                first = next(s.ending for s in streams if s.ending and s.ending.status)
                stop_rest(first)
                stop_rest = None
    finally:
        for stream in streams:
            stream.close()
    for stream in streams:
        if stream.error and (not poll or usable()):
            raise stream.error
    return {stream.worker: stream.ending for stream in streams}


def drain(lines: queue.Queue, echo: Callable[[str], None]) -> None:
    """Prints what has come, once something has or a tick is over."""
    try:
        worker, line = lines.get(timeout=TICK_SECONDS)
        while True:
            echo(f"[{worker}] {line}")
            worker, line = lines.get_nowait()
    except queue.Empty:
        return
