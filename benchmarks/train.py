"""Training steps a second, beside the peers: `python -m benchmarks.train --shape gpt2`."""

from benchmarks.command import Flat, Options, check_losses, main, run_race
from benchmarks.harness import Race
from benchmarks.peers import TRAINING
from benchmarks.report import Row, figure, gigabytes, limits, ranged, rows, table, write
from benchmarks.shapes import SHAPES


def choice(shape: str) -> list[str]:
    """Returns the peers of a shape where none are named."""
    family = SHAPES[shape].family
    if family == "teeny_gpt":
        return ["torch", "torch+compile"]
    return ["hf", "hf+compile"] + (["litgpt", "litgpt+compile"] if family == "llama" else [])


def train(options: Flat = Options()) -> None:
    """Measures training: forward, backward, clipping and AdamW, each loss read.

    The same weights, batches and precision; the loss before the first update has to agree.
    """
    done = run_race(options, TRAINING, choice(options.shape), {})
    lines, wrong = check_losses(done, options.dtype)
    found = with_rates(done, rows(done, "step", "lm"), options.dtype)
    for row in found:
        if row["contestant"] in wrong:
            row.pop("ratio", None)
    shape = SHAPES[options.shape]
    text = "\n\n".join(
        [
            f"{shape.about}; batch {shape.batch_size} x {shape.length}, {options.dtype}.",
            show(found),
            verdict(found, "step"),
            "\n".join(f"- {line}" for line in lines),
        ]
    )
    path = write(options.title("train"), text, {"rows": found, "losses": lines}, done, options.out)
    print(f"\n{path.read_text()}\nwritten to {path}")


def with_rates(done: Race, found: list[Row], dtype: str) -> list[Row]:
    """Adds tokens a second, and the share of the machine's fastest products, where both are known.

    A contestant that does not say how many operations its step takes does those of the reference.
    """
    peak = limits(done).get(dtype)
    reference = found[0]["contestant"] if found else ""
    for row in found:
        facts = done.contestants[row["contestant"]]["facts"]
        seconds = row["seconds"]["median"]
        row["tokens_per_second"] = facts["tokens"] / seconds
        flops = facts.get("flops") or done.contestants[reference]["facts"].get("flops")
        if peak and flops:
            row["mfu"] = flops / seconds / (peak * 1e9)
    return found


def show(found: list[Row]) -> str:
    """Returns the table of a race of steps."""
    header = [
        "contestant",
        "s/step",
        "tokens/s",
        "ours is faster by",
        "CPU s/step",
        "CPU time, by",
        "of the limit",
        "peak GB",
        "first step s",
        "quiet blocks",
        "cores of others",
    ]
    return table(
        header,
        [
            [
                row["contestant"],
                figure(row["seconds"]["median"]),
                figure(row["tokens_per_second"]),
                ranged(row.get("ratio")),
                figure(row["cpu_seconds"]["median"]),
                ranged(row.get("cpu_ratio")),
                f"{row['mfu']:.0%}" if "mfu" in row else "",
                gigabytes(row["peak_rss"]),
                figure(row["first_seconds"]),
                f"{row['quiet']} of {row['blocks']}",
                f"{row['others']:.2f}",
            ]
            for row in found
        ],
    )


def verdict(found: list[Row], unit: str) -> str:
    """Returns the sentence on the best peer; variants of ours are none."""
    peers = [row for row in found if "ratio" in row and not row["contestant"].startswith("lm")]
    if not peers:
        return "No peer took part."
    best = min(peers, key=lambda row: row["ratio"]["median"])
    return (
        f"Beside the best peer, {best['contestant']}, a {unit} of ours is "
        f"{ranged(best['ratio'])} times as fast, with "
        f"{found[0]['peak_rss'] / min(row['peak_rss'] for row in peers):.2f} times the peak memory "
        "of the leanest."
    )


if __name__ == "__main__":
    main(train)
