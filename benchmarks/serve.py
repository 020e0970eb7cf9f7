"""Prompts of different lengths, decoded together: `python -m benchmarks.serve`."""

from statistics import median

from benchmarks.command import Flat, Options, main, run_race
from benchmarks.harness import Race
from benchmarks.peers import SERVING
from benchmarks.report import LIMITS, Row, figure, ranged, rows, table, write
from benchmarks.shapes import SHAPES

PEERS = ("lm+static", "hf", "hf+continuous")
PHASE = "step"


def serve(
    options: Flat = Options(shape="gpt2"),
    count: int = 24,
    prompt: int = 256,
    new: int = 64,
    slots: int = 8,
) -> None:
    """Measures greedy decoding of many prompts, all there at the start, each of its own lengths.

    Ours gives a row to the next prompt as soon as it is free. Tokens are compared.

    Args:
      options: of every command.
      count: number of prompts.
      prompt: most tokens of one; lengths are drawn evenly from an eighth of it on.
      new: most tokens that follow one, drawn likewise.
      slots: prompts that decode together.
    """
    if new < 2 or min(count, prompt, slots) < 1:
        raise ValueError("new is 2 or more, and count, prompt and slots are 1 or more")
    arguments = dict(count=count, prompt=prompt, new=new, slots=slots)
    done = run_race(options, SERVING, PEERS, arguments)
    found = rows(done, PHASE, "lm")
    for row in found:
        blocks = [b for b in done.blocks if b["contestant"] == row["contestant"]]
        row["first_token_seconds"] = median(median(b["values"][-1]["first"]) for b in blocks)
        tokens = done.contestants[row["contestant"]]["facts"]["tokens"]
        row["tokens_per_second"] = tokens / row["seconds"]["median"]
    about = f"{SHAPES[options.shape].about}, {options.dtype}; {count} prompts of "
    about += f"{max(1, prompt // 8)} to {prompt} tokens, {max(2, new // 8)} to {new} new ones, "
    about += f"{slots} at a time."
    lines = "\n".join(f"- {line}" for line in agreement(done))
    warm = [phase for report in done.contestants.values() for phase in report["warm"].values()]
    for value in [value for held in (*done.blocks, *warm) for value in held["values"]]:
        value.pop("tokens", None)  # They were compared; a result has no need of them.
    text = "\n\n".join([about, show(found), lines])
    path = write(options.title("serve"), text, {"rows": found}, done, options.out)
    print(f"\n{path.read_text()}\nwritten to {path}")


def show(found: list[Row]) -> str:
    header = [
        "contestant",
        "s",
        "tokens/s",
        "ours is faster by",
        "CPU time, by",
        "median s to a first token",
        "peak GB",
        "quiet blocks",
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
                f"{row['peak_rss'] / 1e9:.2f}",
                f"{row['quiet']} of {row['blocks']}",
            ]
            for row in found
        ],
    )


def agreement(done: Race) -> list[str]:
    """Returns for each contestant how many prompts got the tokens that ours gave them."""
    texts = {
        name: report["warm"][PHASE]["values"][0]["tokens"]
        for name, report in done.contestants.items()
        if name != LIMITS
    }
    ours = texts.pop("lm")
    return [
        f"{name}: {sum(a == b for a, b in zip(ours, own, strict=True))} of {len(ours)} prompts "
        "got the tokens of ours"
        for name, own in texts.items()
    ]


if __name__ == "__main__":
    main(serve)
