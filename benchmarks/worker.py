"""The process of one contestant: makes its work, then waits on a pipe and runs blocks of it.

    python -m benchmarks.worker '{"make": "benchmarks.ours:train", "options": {...}}'

It imports nothing but the standard library itself, so that a peer may live in an interpreter of its
own. Requests and replies are lines of JSON; whatever a library prints goes to stderr.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "litgpt", "peft", "tokenizers")


class Work(NamedTuple):
    """What the function that makes a contestant returns.

    Attributes:
      run: `run(count, **phase)` does `count` units of work, waits for them, and returns a JSON
        value for each, such as its loss or its tokens, which the commands compare.
      facts: what the report says of it, JSON; 'tokens' are the tokens of a unit, 'flops' its
        floating point operations, where they are known.
      device_peak: returns the largest number of bytes in use on an accelerator; 0 on a CPU.
    """

    run: Callable[..., list[Any]]
    facts: dict[str, Any] = {}
    device_peak: Callable[[], int] = int


def installed(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Returns package -> version of those that this interpreter has."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_rss() -> int:
    """Returns the largest resident size that this process has had, bytes.

    The kernel's own mark of the address space: that of getrusage is inherited from the parent.
    """
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line)


def cpu_seconds() -> float:
    """Returns what all threads of this process have computed, and what waited-for children did."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def measured(function: Callable[[], list[Any]]) -> dict[str, Any]:
    """Runs a function; returns its values with seconds, CPU seconds and page faults."""
    faults, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, cpu_seconds()
    start = time.perf_counter()
    values = function()
    seconds = time.perf_counter() - start
    return {
        "values": values,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
        "peak_rss": peak_rss(),
    }


def begin(make: str, options: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Makes a contestant's work; returns it with its facts and the seconds that it took.

    Raises:
      ModuleNotFoundError: if a package that it needs is not installed.
    """
    module, _, name = make.partition(":")
    start = time.perf_counter()
    function = getattr(importlib.import_module(module), name)
    imported = time.perf_counter()
    work = function(**options)
    made = time.perf_counter()
    seconds = {"import_seconds": imported - start, "make_seconds": made - imported}
    return work, {"facts": work.facts, "versions": installed(), **seconds}


def main() -> None:
    """Serves requests until the pipe closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints does not belong among the replies.

    def reply(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        spec = json.loads(sys.argv[1])
        if cores := spec.pop("cores", 0):
            # Before anything is imported: thread pools are as large as what they may run on.
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        work, report = begin(**spec)
        reply(report)
        for line in sys.stdin:
            request = json.loads(line)
            block = measured(partial(work.run, request["count"], **request["phase"]))
            reply({**block, "device_peak": work.device_peak()})
    except ModuleNotFoundError as error:
        traceback.print_exc()
        reply({"missing": error.name or str(error)})
    except Exception as error:
        traceback.print_exc()
        reply({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


if __name__ == "__main__":
    main()
