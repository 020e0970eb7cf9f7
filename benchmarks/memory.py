"""The largest resident memory of training, each alone: `python -m benchmarks.memory`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine
from benchmarks.command import Flat, Options, check_losses, main, run_race
from benchmarks.harness import Contestant, Race, race
from benchmarks.peers import TRAINING
from benchmarks.report import figure, gigabytes, table, write
from benchmarks.shapes import SHAPES
from benchmarks.train import choice


def memory(options: Flat = Options()) -> None:
    """Measures the peak memory of training, weights and optimizer included, each process alone.

    Both heaps: as the allocator comes (plainheap), and kept, which takes more and is faster.
    """
    names = [f"{name}{heap}" for name in choice(options.shape) for heap in ("", "+plainheap")]
    done = run_race(
        options, TRAINING, ["lm+plainheap", *names], {}, with_limits=False, run=each_alone
    )
    lines, _ = check_losses(done, options.dtype)
    ours = done.contestants.get("lm", {}).get("peak_rss")
    found = [
        {
            "contestant": name,
            "peak_rss": report["peak_rss"],
            "device_peak": report["device_peak"],
            "ratio": report["peak_rss"] / ours if ours else None,
            "state_bytes": report["facts"].get("state_bytes"),
            "temporary_bytes": report["facts"].get("temporary_bytes"),
            "unit_seconds": quiet_seconds(report["warm"]["step"]),
        }
        for name, report in done.contestants.items()
    ]
    header = [
        "contestant",
        "peak resident GB",
        "of ours",
        "peak on the accelerator GB",
        "parameters and optimizer GB",
        "temporaries GB, as compiled",
        "s/step, one measurement",
    ]
    body = [
        [
            row["contestant"],
            gigabytes(row["peak_rss"]),
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            gigabytes(row["device_peak"]) if row["device_peak"] else "",
            gigabytes(row["state_bytes"]) if row["state_bytes"] else "",
            gigabytes(row["temporary_bytes"]) if row["temporary_bytes"] else "",
            figure(row["unit_seconds"]) if row["unit_seconds"] else "disturbed",
        ]
        for row in found
    ]
    shape = SHAPES[options.shape]
    text = "\n\n".join(
        [
            f"{shape.about}; batch {shape.batch_size} x {shape.length}, {options.dtype}; training.",
            table(header, body),
            "\n".join(f"- {line}" for line in lines),
        ]
    )
    path = write(options.title("memory"), text, {"rows": found}, done, options.out)
    print(f"\n{path.read_text()}\nwritten to {path}")


def quiet_seconds(warm: Mapping[str, Any]) -> float | None:
    """Returns what a step took, None if others were busy on the cores: that moves no memory."""
    return warm["unit_seconds"] if machine.is_quiet(warm["others"]) else None


def each_alone(contestants: Sequence[Contestant], **options: Any) -> Race:
    """Runs one contestant after the other, the others ended or not begun."""
    done = Race()
    for contestant in contestants:
        one = race([contestant], **{**options, "rounds": 1, "seconds": 0.0})
        done.contestants |= one.contestants
        done.blocks += one.blocks
        done.absent += one.absent
    return done


if __name__ == "__main__":
    main(memory)
