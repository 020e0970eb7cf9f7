"""Attention forwards and backwards, beside jax.nn and torch: `python -m benchmarks.attention`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.command import TOLERANCE, main
from benchmarks.harness import Contestant, Phases, Race, race
from benchmarks.peers import KEPT_HEAP
from benchmarks.report import RESULTS, Row, figure, ranged, rows, table, write
from benchmarks.shapes import Dtype

OURS = "flash"
ABOUT = {
    "flash": "this library in blocks; their size as it chooses it",
    "reference": "this library with the scores of all places",
    "jax.nn": "jax.nn.dot_product_attention by XLA",
    "cudnn": "this library by cuDNN",
    "torch": "torch's scaled_dot_product_attention; a window as booleans",
}


@dataclass(frozen=True)
class AttentionOptions:
    """What is measured.

    Attributes:
      lengths: places of a row.
      window: how many places each sees, besides the causal mask alone.
      tokens: of a batch; it has this many over its length as rows, 12 heads of 64.
      dtype: of queries, keys and values.
      rounds, seconds, cores, patience: as of the other commands.
      peers: who takes part besides ours.
      out: folder of the results.
      name: of the result besides the dtype.
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    window: int = 256
    tokens: int = 4096
    dtype: Dtype = "fp32"
    rounds: int = 5
    seconds: float = 1.0
    cores: int = 0
    patience: float = 0.0
    peers: tuple[str, ...] = ("reference", "jax.nn", "torch")
    out: Path = RESULTS
    name: str = ""


def attention(options: Annotated[AttentionOptions, tyro.conf.arg(name="")]) -> None:
    """Measures one layer's attention, without projections: causal, and with a window.

    The sums of outputs and of gradients have to agree.
    """
    if unknown := set(options.peers) - ABOUT.keys():
        raise ValueError(f"there is no peer {unknown.pop()!r} here: choose from {', '.join(ABOUT)}")
    if odd := [length for length in options.lengths if options.tokens % length]:
        raise ValueError(f"{options.tokens} tokens are no whole rows of {odd[0]}: choose others")
    phases = {
        f"{length} {'window' if window else 'causal'}": {"length": length, "window": window}
        for length in options.lengths
        for window in (0, options.window)
        if window < length
    }
    done = race(
        [contestant(name, options) for name in dict.fromkeys((OURS, *options.peers))],
        phases=phases,
        rounds=options.rounds,
        seconds=options.seconds,
        warm_up=2,
        patience=options.patience,
    )
    wrong = disagreeing(done, phases, TOLERANCE[options.dtype])
    found = {phase: rows(done, phase, OURS) for phase in phases}
    for name, phase in wrong:
        for row in found[phase]:
            if row["contestant"] == name:
                row.pop("ratio", None)
                row.pop("cpu_ratio", None)
    text = "\n\n".join(
        [
            f"One layer, forwards and backwards, {options.dtype}: {options.tokens:,} tokens in "
            "rows of the length given, 12 heads of 64; causal, and with a window of "
            f"{options.window}.",
            show(found, done),
            "\n".join(f"- {name}, {phase}: NOT THE SAME COMPUTATION" for name, phase in wrong),
        ]
    )
    cores = f"{options.cores}-core" if options.cores else ""
    title = " ".join(filter(None, ["attention", options.dtype, cores, options.name]))
    path = write(title, text, {"rows": found}, done, options.out)
    print(f"\n{path.read_text()}\nwritten to {path}")


def contestant(name: str, options: AttentionOptions) -> Contestant:
    common = {"dtype": options.dtype, "tokens": options.tokens, "about": ABOUT[name]}
    if name == "torch":
        made = ("benchmarks.attend_torch:make", common, KEPT_HEAP)
    elif name == "jax.nn":
        made = ("benchmarks.attend_jax:make", dict(common, function="by_jax", backend="xla"), {})
    else:
        made = ("benchmarks.attend_jax:make", dict(common, function="by_lm", backend=name), {})
    return Contestant(name, *made, cores=options.cores)


def warm_values(done: Race, name: str, phase: str) -> dict[str, float]:
    """Returns what the first unit of a phase returned."""
    return done.contestants[name]["warm"][phase]["values"][0]


def disagreeing(done: Race, phases: Phases, tolerance: float) -> list[tuple[str, str]]:
    """Returns contestants and phases whose sums are not those of ours."""
    return [
        (name, phase)
        for phase in phases
        for name in done.contestants
        if OURS in done.contestants
        and not math.isclose(
            warm_values(done, name, phase)["gradients"],
            warm_values(done, OURS, phase)["gradients"],
            rel_tol=tolerance,
        )
    ]


def show(found: dict[str, list[Row]], done: Race) -> str:
    """Returns the table, a line for each phase and contestant."""
    header = [
        "length and mask",
        "contestant",
        "s",
        "ours is faster by",
        "CPU s",
        "ours takes less CPU by",
        "temporaries MB, as compiled",
        "quiet blocks",
    ]
    body = [
        [
            phase,
            row["contestant"],
            figure(row["seconds"]["median"]),
            ranged(row.get("ratio")),
            figure(row["cpu_seconds"]["median"]),
            ranged(row.get("cpu_ratio")),
            megabytes(warm_values(done, row["contestant"], phase)),
            f"{row['quiet']} of {row['blocks']}",
        ]
        for phase, some in found.items()
        for row in some
    ]
    return table(header, body)


def megabytes(values: dict[str, Any]) -> str:
    return f"{values['temporaries'] / 1e6:.1f}" if "temporaries" in values else ""


if __name__ == "__main__":
    main(attention)
