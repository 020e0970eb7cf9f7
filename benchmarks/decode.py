"""Greedy decoding with a cache, beside transformers: `python -m benchmarks.decode`."""

from typing import Any

from benchmarks.command import Flat, Options, main, run_race
from benchmarks.harness import Race
from benchmarks.peers import DECODING
from benchmarks.report import LIMITS, Row, figure, limits, ranged, rows, table, write
from benchmarks.shapes import SHAPES

PEERS = ("hf", "hf+static")
FIRST, WHOLE = "batch {}: first token", "batch {}: whole"


def decode(
    options: Flat = Options(shape="gpt2"),
    batches: tuple[int, ...] = (1, 8),
    prompt: int = 128,
    new: int = 64,
) -> None:
    """Measures greedy decoding from random prompts: time to the first token, and tokens a second.

    Parameters are stored in the dtype that is computed in, by all contestants. Tokens are compared.

    Args:
      options: of every command.
      batches: numbers of prompts.
      prompt: tokens of each.
      new: tokens that follow.
    """
    if new < 2 or prompt < 1 or min(batches) < 1:
        raise ValueError("new is 2 or more, prompt 1 or more, and so is every one of batches")
    phases: dict[str, dict[str, Any]] = {}
    for batch in batches:
        phases[FIRST.format(batch)] = {"batch": batch, "new": 1}
        phases[WHOLE.format(batch)] = {"batch": batch, "new": new}
    done = run_race(options, DECODING, PEERS, {"prompt": prompt}, phases=phases)
    parts, results = [], {}
    for batch in batches:
        found = both_rows(done, batch, new)
        results[str(batch)] = found
        parts.append(show(found, batch))
    parts += [f"- {line}" for line in agreement(done)]
    text = f"{SHAPES[options.shape].about}, {options.dtype}; prompts of {prompt}, {new} new tokens."
    path = write(
        options.title("decode"), "\n\n".join([text, *parts]), {"rows": results}, done, options.out
    )
    print(f"\n{path.read_text()}\nwritten to {path}")


def both_rows(done: Race, batch: int, new: int) -> list[Row]:
    """Returns the rows of a whole generation, with what its first token and the others took."""
    firsts = {row["contestant"]: row for row in rows(done, FIRST.format(batch), "lm")}
    found = rows(done, WHOLE.format(batch), "lm")
    read = limits(done).get("read")
    for row in found:
        whole, first = row["seconds"]["median"], firsts[row["contestant"]]["seconds"]["median"]
        row["first_token_seconds"] = first
        row["first_token_ratio"] = firsts[row["contestant"]].get("ratio")
        row["tokens_per_second"] = batch * new / whole
        row["seconds_per_token"] = (whole - first) / (new - 1)
        if read and row["seconds_per_token"] > 0:
            size = done.contestants[row["contestant"]]["facts"]["bytes"]
            row["bandwidth"] = size / row["seconds_per_token"] / (read * 1e9)
    return found


def show(found: list[Row], batch: int) -> str:
    header = [
        f"batch {batch}",
        "s",
        "tokens/s",
        "ours is faster by",
        "CPU time, by",
        "first token s",
        "ours is faster by",
        "s/token after",
        "weights read, of the limit",
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
                ranged(row.get("cpu_ratio")),
                figure(row["first_token_seconds"]),
                ranged(row["first_token_ratio"]),
                figure(row["seconds_per_token"]),
                f"{row['bandwidth']:.0%}" if "bandwidth" in row else "",
                f"{row['quiet']} of {row['blocks']}",
                f"{row['others']:.2f}",
            ]
            for row in found
        ],
    )


def agreement(done: Race) -> list[str]:
    """Returns for each contestant how many tokens, by place, are those of ours."""
    lines = []
    for name, report in done.contestants.items():
        if name in ("lm", LIMITS) or "lm" not in done.contestants:
            continue
        for phase, warm in report["warm"].items():
            ours = done.contestants["lm"]["warm"][phase]["values"][0]
            pairs = [
                pair
                for mine, other in zip(ours, warm["values"][0], strict=True)
                for pair in zip(mine, other, strict=True)
            ]
            equal = sum(a == b for a, b in pairs)
            lines.append(f"{name}, {phase}: {equal} of {len(pairs)} tokens are those of ours")
    return lines


if __name__ == "__main__":
    main(decode)
