"""What the commands share: their options, and the way from them to a race."""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.harness import ONE_PHASE, Contestant, Phases, Race, race
from benchmarks.inputs import make_inputs
from benchmarks.peers import Peer, contestants, parse_pythons
from benchmarks.report import LIMITS, RESULTS
from benchmarks.shapes import Dtype, ShapeName

# Relative difference of the loss before the first update that still is the same computation.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}


@dataclass(frozen=True)
class Options:
    """What every command takes.

    Attributes:
      shape: the model, the batch and the length; see `benchmarks/shapes.py`.
      dtype: of the computation; parameters and optimizer state are fp32 but where a peer says so.
      rounds: timed rounds, A B C and C B A in turn; 0 to compare the losses alone.
      seconds: about how long a block of a contestant is, in whole steps.
      cores: that each contestant may use; 0 is all. With one, CPU seconds can be compared on a
        machine that others use, too.
      patience: seconds that each turn waits, at most, for other processes to leave the cores alone.
      peers: who takes part besides ours; none for the command's own choice. A '+' says how: compile
        (torch.compile), pure (bf16 parameters), plainheap (the allocator as it comes); and for ours
        a field of TrainConfig, such as lm+micro_batches=16.
      python: interpreters of peers that live elsewhere, such as litgpt=/env/litgpt/bin/python.
      out: folder of the results.
      name: of the result besides shape and dtype, to tell one run from another of the day.
    """

    shape: ShapeName = "baby"
    dtype: Dtype = "fp32"
    rounds: int = 5
    seconds: float = 4.0
    cores: int = 0
    patience: float = 0.0
    peers: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    out: Path = RESULTS
    name: str = ""

    def title(self, command: str) -> str:
        cores = f"{self.cores}-core" if self.cores else ""
        return " ".join(filter(None, [command, self.shape, self.dtype, cores, self.name]))


def run_race(
    options: Options,
    known: Mapping[str, Peer],
    names: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    phases: Phases = ONE_PHASE,
    with_limits: bool = True,
    run: Callable[..., Race] = race,
) -> Race:
    """Makes the inputs and the contestants of a command, and races them.

    Args:
      options: of the command line.
      known: the peers that the command has.
      names: its own choice of them.
      arguments: of every contestant, besides shape, inputs and dtype.
      phases: as of `race`.
      with_limits: whether the machine's limits are measured in the same rounds.
      run: what races them.

    Raises:
      ValueError: for a name, a way or an interpreter that there is not.
    """
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as scratch:
        inputs = Path(scratch) / "inputs"
        common = {"shape": options.shape, "inputs": str(inputs), "dtype": options.dtype}
        pythons = parse_pythons(options.python)
        chosen, out = contestants(
            known,
            options.peers or names,
            options.shape,
            {**common, **arguments},
            pythons,
            Path(scratch),
        )
        for sentence in out:
            print(sentence)
        make_inputs(options.shape, inputs)
        if with_limits:
            chosen.append(Contestant(LIMITS, "benchmarks.limits:make", phases={LIMITS: {}}))
        chosen = [replace(one, cores=options.cores) for one in chosen]
        done = run(
            chosen,
            phases=phases,
            rounds=options.rounds,
            seconds=options.seconds,
            patience=options.patience,
        )
        done.absent[:0] = out
        return done


def check_losses(done: Race, dtype: str, reference: str = "lm") -> tuple[list[str], list[str]]:
    """Compares the losses before the first update, and after the first ones.

    Returns:
      A line for each contestant, and the names of those that do not compute the same.
    """
    first = {
        name: next(iter(report["warm"].values()))["values"]
        for name, report in done.contestants.items()
        if name != LIMITS
    }
    lines, wrong = [], []
    for name, values in first.items():
        if name == reference or reference not in first:
            continue
        apart = [abs(a - b) / abs(b) for a, b in zip(values, first[reference])]
        lines.append(
            f"{name}: loss {values[0]:.6f} at step 0, {apart[0]:.1e} from ours, relatively; "
            f"{max(apart):.1e} at most over the first {len(apart)} steps"
        )
        if not apart[0] <= TOLERANCE[dtype]:
            wrong.append(name)
            lines[-1] += ": NOT THE SAME COMPUTATION"
    return lines, wrong


def main(function: Callable[..., Any]) -> None:
    """Runs a command; bad input is one sentence and status 2."""
    try:
        tyro.cli(function)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


Flat = Annotated[Options, tyro.conf.arg(name="")]
