"""The results of a race as JSON and as a Markdown table."""

import datetime
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.harness import ROOT, Race, ratios, spread

RESULTS = ROOT / "benchmarks" / "results"
LIMITS = "limits"
Row = dict[str, Any]


def rows(race: Race, phase: str, reference: str) -> list[Row]:
    """Returns a row for each contestant of a phase: times, ratios and how quiet it was.

    'ratio' is by what factor the reference was faster than the contestant in the same round: of
    rounds in which both were undisturbed; where there is none, of all, and 'disturbed' is True.
    Processes with many barriers, such as torch's, lose most where the cores are shared;
    'cpu_ratio', of the CPU seconds of all rounds, means something there if each has one core.
    """
    found = []
    for name, report in race.contestants.items():
        times = race.times(name, phase)
        if name == LIMITS or not times:
            continue
        blocks = [b for b in race.blocks if (b["contestant"], b["phase"]) == (name, phase)]
        quiet = sum(machine.is_quiet(block["others"]) for block in blocks)
        row = {
            "contestant": name,
            "seconds": spread(list(times.values())),
            "cpu_seconds": spread(list(race.times(name, phase, clock="cpu_seconds").values())),
            "peak_rss": report["peak_rss"],
            "first_seconds": report["first_seconds"],
            "blocks": len(blocks),
            "quiet": quiet,
            "others": spread([block["others"] for block in blocks])["median"],
        }
        undisturbed = ratios(race, phase, name, reference, quiet=True)
        if name != reference and (each := undisturbed or ratios(race, phase, name, reference)):
            row["ratio"] = {**spread(each), "rounds": len(each), "disturbed": not undisturbed}
            row["cpu_ratio"] = spread(ratios(race, phase, name, reference, clock="cpu_seconds"))
        found.append(row)
    return found


def limits(race: Race) -> dict[str, float]:
    """Returns the medians over the rounds of what `benchmarks.limits` measured."""
    values = [block["values"][-1] for block in race.blocks if block["contestant"] == LIMITS]
    names = values[0] if values else ()
    return {name: spread([value[name] for value in values])["median"] for name in names}


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: float) -> str:
    """Returns a number with three significant figures, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}"


def ranged(values: Mapping[str, float] | None) -> str:
    """Returns 'median (least-most)', with a mark where every round was disturbed."""
    if values is None:
        return ""
    mark = " disturbed" if values.get("disturbed") else ""
    return f"{values['median']:.2f} ({values['least']:.2f}-{values['most']:.2f}){mark}"


def settings(race: Race) -> str:
    """Returns what each contestant was, a line each, and who was absent."""
    lines = [
        f"- {name}: {report['facts'].get('settings', '')}"
        for name, report in race.contestants.items()
    ]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in race.absent)])


def versions(race: Race) -> dict[str, str]:
    """Returns package -> version, of all interpreters; two where they differ."""
    found: dict[str, set[str]] = {}
    for report in race.contestants.values():
        for package, number in report["versions"].items():
            found.setdefault(package, set()).add(number)
    return {package: " and ".join(sorted(numbers)) for package, numbers in found.items()}


def stamp(race: Race) -> str:
    """Returns the lines on the machine, the software and the command."""
    here = machine.describe()
    devices = {report["facts"].get("device") for report in race.contestants.values()}
    devices -= {None, "cpu"}
    software = ", ".join(f"{name} {number}" for name, number in sorted(versions(race).items()))
    measured = limits(race)
    lines = [
        f"{here['date']}, {here['cores']} cores of {here['cpu']}"
        + (f", {', '.join(sorted(devices))}" if devices else "")
        + f"; {software}.",
        f"Load of the machine at the end: {here['load']:.1f}.",
    ]
    if measured:
        lines.append(
            f"Measured limits: {figure(measured['fp32'])} GFLOP/s fp32, "
            f"{figure(measured['bf16'])} GFLOP/s bf16, {figure(measured['read'])} GB/s read, "
            f"{figure(measured['copy'])} GB/s copied."
        )
    lines.append(f"Command: `{command()}`")
    return "\n".join(lines)


def command() -> str:
    """Returns the command line of this program."""
    file = Path(sys.argv[0])
    return " ".join([f"python -m benchmarks.{file.stem}", *sys.argv[1:]])


def write(
    name: str, text: str, results: Mapping[str, Any], race: Race, folder: Path = RESULTS
) -> Path:
    """Writes DATE-NAME.json and DATE-NAME.md; returns the path of the second.

    Args:
      name: of the benchmark with its shape and dtype.
      text: the table with what is said of it.
      results: what the JSON has besides the race.
      race: all that was measured.
      folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    path = folder / f"{date}-{re.sub('[^a-z0-9.+-]+', '-', name.lower())}.md"
    whole = {
        "name": name,
        "command": command(),
        "machine": machine.describe(),
        "versions": versions(race),
        "limits": limits(race),
        **results,
        "contestants": race.contestants,
        "absent": race.absent,
        "blocks": race.blocks,
    }
    path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    path.write_text(f"# {name}\n\n{text}\n\n{settings(race)}\n\n{stamp(race)}\n")
    return path
