"""Signs of life: each process writes where it stands, and its supervisor reads it.

A process writes to the file that `LM_BEAT` names, and nothing where there is none. It tells when
it arrives at a step, where all processes meet, and when it goes on with work of its own; a thread
renews the file every second, so that a process which stands still can be told from a stopped one.
"""

import functools
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

BEAT = "LM_BEAT"
BEAT_SECONDS = 1.0
_SIZE = 256  # Of the file: one write of so few bytes is seen whole or not at all.


@dataclass(frozen=True)
class Mark:
    """Where a process stands.

    Attributes:
      count: places that it came to so far, the same for all processes at the same place.
      step: that it is in, or after.
      place: in words.
      since: when it came there, by `time.time`.
      busy: seconds of its own work between steps so far, without waiting for devices or others.
      at: when this was written.
    """

    count: int = 0
    step: int = 0
    place: str = "starting"
    since: float = 0.0
    busy: float = 0.0
    at: float = 0.0


class Beat:
    """The writer of one process's signs of life."""

    def __init__(self, path: str | Path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.lock = threading.Lock()
        self.resumed: float | None = None
        self.mark = Mark(since=time.time())
        self.write()
        threading.Thread(target=self.renew, daemon=True).start()

    def come_to(self, place: str, step: int) -> None:
        """Tells that this process came to a place, for each process the next one."""
        now = time.time()
        with self.lock:
            busy = self.mark.busy + (now - self.resumed if self.resumed else 0.0)
            self.resumed = None
            self.mark = Mark(self.mark.count + 1, step, place, now, busy)
        self.write()

    def resume(self, place: str, step: int) -> None:
        """Tells that what it waited for is over, and its own work goes on."""
        self.come_to(place, step)
        self.resumed = self.mark.since

    def write(self) -> None:
        with self.lock:
            content = json.dumps(asdict(self.mark) | {"at": time.time()})
            os.pwrite(self.file, content.ljust(_SIZE).encode(), 0)

    def renew(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.write()


@functools.cache
def own_beat() -> Beat | None:
    """Returns the writer of this process, or None where nobody asked for its signs of life."""
    path = os.environ.get(BEAT)
    return Beat(path) if path else None


def come_to(place: str, step: int) -> None:
    """Tells that this process came to a place where it may wait for the others."""
    if beat := own_beat():
        beat.come_to(place, step)


def resume(place: str, step: int) -> None:
    """Tells that this process goes on with work of its own."""
    if beat := own_beat():
        beat.resume(place, step)


def read_mark(path: str | Path) -> Mark | None:
    """Returns what a process wrote last, or None if it wrote nothing yet."""
    try:
        return Mark(**json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None
