"""Which of several processes is the lost, the hung or the slow one, by what is seen of them all."""

import re
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lm.core.beat import BEAT_SECONDS, Mark

# A process that has renewed its mark for so long is not running.
STALE_SECONDS = 5 * BEAT_SECONDS
# Of its own work between steps, beside that of the others and beside a whole step.
SLOW_TIMES, SLOW_SHARE = 2.0, 0.2
# What a process says at its end when it is another one that was lost.
PEER_LOST = re.compile(
    r"Gloo|NCCL|Connection (closed|reset)|Socket closed|heartbeat|coordination service|"
    r"CoordinationService|another task|DEADLINE_EXCEEDED|UNAVAILABLE|Barrier",
    re.IGNORECASE,
)
LOST_TASK = re.compile(r"/task:(\d+)")
# Lines that belong to a trace of C++, by absl's format and that of its stacks.
TRACE = re.compile(
    r"^(\[Gloo\] |[IWEF]\d{4} \d\d:\d\d:\d\d|[IWEF]\d{8} |\*\*\* |\s+@ +0x|#\d+ +0x|PC: @"
    r"|Fatal Python error|Aborted|terminate called|\s*what\(\):|WARNING: All log messages before)"
)
# Lines between and after tracebacks of Python, and those of jax about them.
NOTES = re.compile(
    r"^(\s*$|The above exception was|During handling of|-{20}$|For simplicity, JAX has removed)"
)


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
      status: as of `subprocess`, negative for a signal.
      tail: its last lines.
      time: when.
    """

    status: int
    tail: str
    time: float


def lost(ends: Mapping[int, End], stale: Sequence[int]) -> tuple[int, str]:
    """Returns which process is the cause of a loss, and what became of it.

    What ends a job ends all of its processes: one is killed, or fails, and the others fail as they
    wait for it. A process is the cause if a signal killed it, or else if nothing it said is of
    another one's loss, or else if it no longer runs, or else if the others say that they lost it.

    Args:
      ends: rank -> its end, of all that ended.
      stale: ranks that did not end, and gave no sign of life.
    """
    failed = {rank: end for rank, end in ends.items() if end.status not in (0, 130)}
    order = sorted(failed, key=lambda rank: failed[rank].time)
    for rank in order:
        if failed[rank].status < 0 and -failed[rank].status != signal.SIGABRT:
            return rank, f"was killed by {signal.Signals(-failed[rank].status).name}"
    for rank in order:
        if not PEER_LOST.search(failed[rank].tail):
            return rank, ended_with(failed[rank])
    if stale:
        return stale[0], "is stopped, or its host does not run it"
    for rank in order:
        named = [int(task) for task in LOST_TASK.findall(failed[rank].tail)]
        if elsewhere := [task for task in named if task not in ends]:
            return elsewhere[0], "was lost on another host, or its host was"
    return order[0], ended_with(failed[order[0]])


def ended_with(end: End) -> str:
    """Returns what became of a process, with the last word of it that tells why."""
    if end.status < 0:
        return f"was ended by {signal.Signals(-end.status).name}"
    lines = (line for line in end.tail.splitlines() if not TRACE.match(line))
    said = [line for line in lines if not NOTES.match(line)]
    last = said[-1].strip().removeprefix("lm: ") if said else ""
    return f"ended with status {end.status}" + (f" ({last[:300]})" if last else "")


def hung(marks: Mapping[int, Mark | None], now: float, limit: float) -> str:
    """Returns which process holds the others up, where all stand still for longer than a limit.

    They wait for each other, so that one that hangs soon stops all. The one that does not run, or
    else the one that did not come to where the others wait, is the cause.

    Args:
      marks: rank -> where it stands, of those that run; None where it wrote nothing.
      now: by `time.time`.
      limit: seconds.

    Returns:
      A clause, or '' where nothing hangs.
    """
    known = {rank: mark for rank, mark in marks.items() if mark is not None}
    still = {r: now - mark.since for r, mark in known.items() if mark.place != "the end"}
    if not still or min(still.values()) <= limit:
        return ""
    silence = max(STALE_SECONDS, limit / 2)
    stale = [rank for rank, mark in known.items() if now - mark.at > silence]
    if stale:
        mark = known[stale[0]]
        return (
            f"process {stale[0]} hangs: it gave no sign of life for {now - mark.at:.0f} s, and is "
            f"stopped or starved; it last came to {mark.place} {mark.step}"
        )
    least, most = (pick(mark.count for mark in known.values()) for pick in (min, max))
    if most == 0:
        return ""  # Before the first step one may make data, and the others wait for it.
    behind = [rank for rank, mark in known.items() if mark.count == least]
    if least == most:
        places = {f"{mark.place} {mark.step}" for mark in known.values()}
        return (
            f"no process went on for {min(still.values()):.0f} s, and none of this host is behind "
            f"the others: all came to {', '.join(sorted(places))}, so that devices, network or "
            "another host hang"
        )
    mark = known[behind[0]]
    return (
        f"process {behind[0]} hangs: for {still.get(behind[0], 0.0):.0f} s it did not go on from "
        f"{mark.place} {mark.step}, and the others wait for it"
    )


class Pace:
    """Compares how long processes work by themselves between steps, over stretches of time."""

    def __init__(self, seconds: float):
        self.seconds, self.began = seconds, time.time()
        self.before: dict[int, Mark] = {}
        self.told: dict[int, int] = {}

    def look(self, marks: Mapping[int, Mark]) -> str:
        """Returns a clause that names a process which was slow twice in a row, or ''."""
        now = time.time()
        if now - self.began < self.seconds:
            return ""
        slow = slow_ranks(self.before, marks, now - self.began)
        self.told = {rank: self.told.get(rank, 0) + 1 for rank in slow}
        self.began, self.before = now, dict(marks)
        for rank, count in self.told.items():
            if count == 2:
                own, others, step = slow[rank]
                return (
                    f"process {rank} is slow: it works {own:.3g} s by itself between steps, the "
                    f"others {others:.3g} s, of {step:.3g} s that a step takes; its host or its "
                    "data hold the job up"
                )
        return ""


def slow_ranks(
    before: Mapping[int, Mark], after: Mapping[int, Mark], seconds: float
) -> dict[int, tuple[float, float, float]]:
    """Returns the slow among processes: rank -> seconds a step of its own work, of the median
    of the others, and of the whole step.

    Args:
      before, after: rank -> mark, at the beginning and at the end of a stretch.
      seconds: between them.
    """
    steps = {r: after[r].step - before[r].step for r in after if r in before}
    own = {r: (after[r].busy - before[r].busy) / n for r, n in steps.items() if n > 0}
    found = {}
    for rank, time_a_step in own.items():
        others = [value for other, value in own.items() if other != rank]
        if not others:
            continue
        usual, step = statistics.median(others), seconds / steps[rank]
        if time_a_step > SLOW_TIMES * usual and time_a_step - usual > SLOW_SHARE * step:
            found[rank] = (time_a_step, usual, step)
    return found
