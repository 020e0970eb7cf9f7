"""Time to the first step, without and with a warm cache: `python -m benchmarks.compile`."""

from collections.abc import Sequence
from typing import Any

from benchmarks.command import Flat, Options, main, run_race
from benchmarks.harness import Contestant, Race, race
from benchmarks.peers import TRAINING
from benchmarks.report import figure, table, write
from benchmarks.shapes import SHAPES
from benchmarks.train import choice

WARM = ", again"


def compile(options: Flat = Options()) -> None:
    """Measures how long it is from the start of a process to its first loss, each process alone.

    Each starts from fresh parameters, twice: with empty caches of compiled programs, and with those
    that the first time has left.
    """
    fresh = {"fresh": True} if SHAPES[options.shape].family != "teeny_gpt" else {}
    done = run_race(
        options, TRAINING, choice(options.shape), fresh, with_limits=False, run=each_twice
    )
    found = [
        {
            "contestant": name,
            "import_seconds": report["import_seconds"],
            "first_seconds": report["first_seconds"],
            "step_seconds": report["warm"]["step"]["unit_seconds"],
            "others": report["warm"]["step"]["others"],
        }
        for name, report in done.contestants.items()
    ]
    header = ["contestant", "imports s", "then to the first loss s", "a later step s"]
    body = [
        [
            row["contestant"],
            figure(row["import_seconds"]),
            figure(row["first_seconds"]),
            figure(row["step_seconds"]),
        ]
        for row in found
    ]
    shape = SHAPES[options.shape]
    about = f"{shape.about}; batch {shape.batch_size} x {shape.length}, {options.dtype}; training."
    text = f"{about}\n\n{table(header, body)}"
    path = write(options.title("compile"), text, {"rows": found}, done, options.out)
    print(f"\n{path.read_text()}\nwritten to {path}")


def each_twice(contestants: Sequence[Contestant], **options: Any) -> Race:
    """Runs one contestant after the other, each in two processes with the same caches."""
    done = Race()
    for contestant in contestants:
        for again in ("", WARM):
            one = race([contestant], **{**options, "rounds": 0, "warm_up": 2})
            done.absent += one.absent
            for name, report in one.contestants.items():
                done.contestants[name + again] = report
            if one.absent:
                break
    return done


if __name__ == "__main__":
    main(compile)
