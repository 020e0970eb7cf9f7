"""Contestants of the harness's own tests."""

import os
import time

from benchmarks.worker import Work


def sleeper(seconds: float, value: float = 1.0) -> Work:
    """Sleeps for every unit, and prints, as libraries do."""
    print("a library says something")

    def run(count: int, times: int = 1) -> list[float]:
        time.sleep(count * times * seconds)
        return [value] * count

    return Work(run, {"tokens": 100, "settings": "sleeps", "cores": len(os.sched_getaffinity(0))})


def absent() -> Work:
    import a_package_that_nobody_has  # noqa: F401

    raise AssertionError


def broken() -> Work:
    raise RuntimeError("out of order")


def dies() -> Work:
    def run(count: int, times: int) -> list[float]:
        raise SystemExit("killed by something")

    return Work(run)
