"""LoRA beside peft, and beside training everything: `python -m benchmarks.finetune`."""

from benchmarks.command import Flat, Options, check_losses, main, run_race
from benchmarks.peers import FINETUNING
from benchmarks.report import figure, ranged, rows, table, write
from benchmarks.shapes import SHAPES
from benchmarks.train import show, with_rates

PEERS = ("lm-full", "peft", "peft+compile")


def finetune(options: Flat = Options(shape="gpt2")) -> None:
    """Measures a step of LoRA of rank 8; the reference is ours.

    Of a Llama, all adapt the projections of queries and values, the same function. Of a GPT-2 peft
    adapts the fused projection, its own choice, and ours queries and values: as many weights.
    """
    done = run_race(options, FINETUNING, PEERS, {})
    lines, wrong = check_losses(done, options.dtype)
    found = with_rates(done, rows(done, "step", "lm"), options.dtype)
    for row in found:
        # A peer that trains an adapter does the operations of our adapter, and not those of our
        # full step; what others do here is not stated.
        if "flops" not in done.contestants[row["contestant"]]["facts"] and not row[
            "contestant"
        ].startswith("peft"):
            row.pop("mfu", None)
        if row["contestant"] in wrong:
            row.pop("ratio", None)
    shape = SHAPES[options.shape]
    trained = table(
        ["contestant", "trained weights", "step of ours, of theirs"],
        [
            [
                row["contestant"],
                figure(done.contestants[row["contestant"]]["facts"]["trained"]),
                ranged(inverse(row.get("ratio"))),
            ]
            for row in found
        ],
    )
    text = "\n\n".join(
        [
            f"{shape.about}; batch {shape.batch_size} x {shape.length}, {options.dtype}; LoRA.",
            show(found),
            trained,
            "\n".join(f"- {line}" for line in lines),
        ]
    )
    results = {"rows": found, "losses": lines}
    path = write(options.title("finetune"), text, results, done, options.out)
    print(f"\n{path.read_text()}\nwritten to {path}")


def inverse(values: dict[str, float] | None) -> dict[str, float] | None:
    """Returns one over a median and its range."""
    if values is None:
        return None
    names = {"median": "median", "least": "most", "most": "least"}
    return {**values, **{name: 1 / values[other] for name, other in names.items()}}


if __name__ == "__main__":
    main(finetune)
