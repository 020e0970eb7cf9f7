"""The machine that is measured on: what it is, and what else ran on it during a block."""

import datetime
import os
import platform
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

# Fields of the first line of /proc/stat (proc(5)).
BUSY = ("user", "nice", "system", "irq", "softirq")
FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
# A block beside which less than this share of the cores was busy counts as undisturbed.
QUIET = 0.1
SAMPLE = 1.0  # Seconds.


class Ticks(NamedTuple):
    """Seconds of all cores since boot: computing, and taken away by the host of this machine."""

    busy: float
    steal: float


def read_ticks(line: str | None = None) -> Ticks:
    """Returns the seconds of /proc/stat; `line` is its first one."""
    if line is None:
        line = Path("/proc/stat").read_text().splitlines()[0]
    values = dict(zip(FIELDS, map(int, line.split()[1:])))
    hertz = os.sysconf("SC_CLK_TCK")
    return Ticks(sum(values[name] for name in BUSY) / hertz, values["steal"] / hertz)


def others(before: Ticks, after: Ticks, own: float, seconds: float) -> float:
    """Returns how many cores were, on average, not the contestant's while it ran.

    Args:
      before, after: around the block.
      own: CPU seconds of the contestant.
      seconds: length of the block.
    """
    taken = after.busy - before.busy - own + after.steal - before.steal
    return max(0.0, taken / seconds)


def wait_for_quiet(patience: float) -> None:
    """Returns once other processes leave the cores alone, or after `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before, start = read_ticks(), time.monotonic()
        time.sleep(SAMPLE)
        if is_quiet(others(before, read_ticks(), 0.0, time.monotonic() - start)):
            return


def is_quiet(busy: float) -> bool:
    """Whether so many cores busy with others leave a block undisturbed."""
    return busy < QUIET * cores()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def free_bytes() -> int:
    """Returns the memory that can be had without swapping."""
    text = Path("/proc/meminfo").read_text()
    return int(re.findall(r"MemAvailable:\s+(\d+)", text)[0]) << 10


def describe() -> dict[str, Any]:
    """Returns what a result is stamped with besides versions, which the contestants report."""
    text = Path("/proc/cpuinfo").read_text()
    values = dict(re.findall(r"(model name|model|cpu family|flags)\s*:\s*(.+)", text))
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": f"{values.get('model name', platform.processor())}, family "
        f"{values.get('cpu family', '?')} model {values.get('model', '?')}",
        "features": [name for name in wanted if name in values.get("flags", "").split()],
        "cores": cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
