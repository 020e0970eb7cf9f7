"""The data pipeline beside training, in tokens a second: `python -m benchmarks.data`."""

from benchmarks.command import Flat, Options, main, run_race
from benchmarks.peers import DATA
from benchmarks.report import figure, rows, table, write
from benchmarks.shapes import SHAPES

PARTS = ("tokenize", "pack", "loader", "loader+prefetch=2")


def data(options: Flat = Options()) -> None:
    """Measures the parts of the data pipeline and training at a shape, in the same rounds."""
    done = run_race(options, DATA, PARTS, {}, with_limits=False)
    found = rows(done, "step", "lm")
    for row in found:
        tokens = done.contestants[row["contestant"]]["facts"]["tokens"]
        row["tokens_per_second"] = tokens / row["seconds"]["median"]
    training = next(row["tokens_per_second"] for row in found if row["contestant"] == "lm")
    header = ["part", "tokens/s", "of training", "quiet blocks", "cores of others"]
    body = [
        [
            "training" if row["contestant"] == "lm" else row["contestant"],
            figure(row["tokens_per_second"]),
            f"{figure(row['tokens_per_second'] / training)} times",
            f"{row['quiet']} of {row['blocks']}",
            f"{row['others']:.2f}",
        ]
        for row in found
    ]
    shape = SHAPES[options.shape]
    about = f"{shape.about}; batch {shape.batch_size} x {shape.length}, {options.dtype}."
    text = f"{about}\n\n{table(header, body)}"
    path = write(options.title("data"), text, {"rows": found}, done, options.out)
    print(f"\n{path.read_text()}\nwritten to {path}")


if __name__ == "__main__":
    main(data)
