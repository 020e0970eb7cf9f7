"""The collectives of a compiled program, read from the text that its compiler prints.

A collective in the body of a loop counts once for each of its rounds.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
      kind: a name in `KINDS`.
      count: how often one runs.
      bytes: that a device sends in all of them, by the algorithm that sends least: a ring, on which
        of n devices each passes (n - 1) / n of the whole to the next, and in an all-reduce twice.
    """

    kind: str
    count: int
    bytes: float


class Instruction(NamedTuple):
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    rest: str


Program = dict[str, list[Instruction]]

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
ASSIGNED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
CHANNEL = re.compile(r"channel_id=\d+")
OPCODE = re.compile(r"\s*([\w\-]+)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
CONSTANT = re.compile(r"^(\d+)\)")
GROUPS_LISTED = re.compile(r"replica_groups=\{\{([\d,\s]*)\}")
GROUPS_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
MESH_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")
GROUPS_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
PARTITIONS = re.compile(r"\b(num_partitions|replica_count)=(\d+)")


def collectives(text: str) -> tuple[Collective, ...]:
    """Returns the collectives of a program by kind, in the order of `KINDS`, those that it has.

    Of a loop whose number of rounds the compiler does not know one round counts, and of a branch
    every side.

    Args:
      text: of an optimised module, `compiled.as_text()`.

    Raises:
      ValueError: if it is no such text.
    """
    entry, program = parse(text)
    devices = math.prod(int(number) for _, number in PARTITIONS.findall(text.partition("\n")[0]))
    copies: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    sizes: dict[tuple[str, str], float] = {}
    for times, computation, instruction in executed(entry, program):
        kind = kind_of(instruction, computation)
        if kind is None:
            continue
        channel = CHANNEL.search(instruction.rest)
        which = kind, channel[0] if channel else instruction.name
        copies[which][instruction.name] += times
        sizes[which] = bytes_sent(
            kind, instruction, devices, in_place=computation.startswith(SCATTERS)
        )
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for which, names in copies.items():
        # Sent bit by bit beside other work, one collective stands in several computations.
        count, sent = found[which[0]]
        times = max(names.values())
        found[which[0]] = count + times, sent + times * sizes[which]
    return tuple(Collective(kind, *found[kind]) for kind in KINDS if kind in found)


def parse(text: str) -> tuple[str, Program]:
    """Returns the name of the entry computation, and the instructions of every computation."""
    program: Program = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = None if line.startswith("HloModule") else HEADER.match(line)
            if header:
                current = program.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None and (assigned := ASSIGNED.match(line)):
            shape, rest = split_shape(line[assigned.end() :])
            if operation := OPCODE.match(rest):
                current.append(Instruction(assigned[1], shape, operation[1], operation[2]))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return entry, program


def split_shape(text: str) -> tuple[str, str]:
    """Returns the shape that a text begins with, one word or a tuple in parentheses; the rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], text[index + 1 :]
    return text, ""


def executed(name: str, program: Program, times: int = 1) -> Iterator[tuple[int, str, Instruction]]:
    """Yields every instruction that a computation leads to: how often, of which computation, it."""
    for instruction in program.get(name, ()):
        yield times, name, instruction
        if instruction.opcode in ("async-update", "async-done"):
            continue  # They name again what their start has called.
        rounds = trip_count(instruction, program) if instruction.opcode == "while" else 1
        for called in called_by(instruction):
            yield from executed(called, program, times * rounds)


def called_by(instruction: Instruction) -> Iterator[str]:
    for one, several in CALLED.findall(instruction.rest):
        yield from [one] if one else re.findall(r"%?([\w.\-]+)", several)


def trip_count(loop: Instruction, program: Program) -> int:
    """Returns the rounds of a loop: as noted by the compiler, or what its condition compares with.

    A loop that counts from 0 has one constant in its condition; of any other, 1 is returned.
    """
    if noted := TRIPS.search(loop.rest):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    if condition is None:
        return 1
    numbers = [
        int(found[1])
        for _, _, instruction in executed(condition[1], program)
        if instruction.opcode == "constant" and (found := CONSTANT.match(instruction.rest))
    ]
    return numbers[0] if len(numbers) == 1 else 1


# A TPU's compiler puts an all-reduce, and the cut of a device's part, into a computation of this
# name: together they are a reduce-scatter.
SCATTERS = "all-reduce-scatter"


def kind_of(instruction: Instruction, computation: str) -> str | None:
    """Returns the kind of a collective, None for any other instruction."""
    kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    if kind not in KINDS:
        return None
    return "reduce-scatter" if computation.startswith(SCATTERS) else kind


def bytes_sent(kind: str, instruction: Instruction, devices: int, in_place: bool) -> float:
    """Returns the bytes that each device sends, as `Collective` counts them.

    Args:
      kind: of the collective.
      instruction: its shape is that of the result; of one that starts, of operand and result.
      devices: of the program, which are one group where no groups are named.
      in_place: whether the result of a reduce-scatter is still as large as its operand.
    """
    size = float(sum(array_bytes(instruction.shape)))
    n = group_size(instruction.rest, devices)
    starts = instruction.opcode.endswith("-start")
    if kind == "collective-permute":
        sizes = [size for size in array_bytes(instruction.shape) if size > 4]  # Without semaphores.
        return sum(sizes) / (2 if starts else 1)
    if kind == "all-gather" and starts:
        size *= n / (n + 1)
    if kind == "reduce-scatter" and not in_place:
        size *= n / (n + 1) if starts else n
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def group_size(attributes: str, devices: int) -> int:
    """Returns how many devices a collective joins, as its attributes say in one of three ways.

    They are {{0,1},{2,3}}, [2,2]<=[4] (groups by size), or mesh['x'=2,'y'=2] {'y'}: the axes over
    which it goes, 'y':(1)2 being 2 of an axis. Where nothing is said it is all devices.
    """
    if counted := GROUPS_COUNTED.search(attributes):
        return int(counted[2])
    if listed := GROUPS_LISTED.search(attributes):
        return len(listed[1].split(","))
    if named := GROUPS_NAMED.search(attributes):
        sizes = {name: int(size) for name, size, _ in MESH_AXIS.findall(named[1])}
        joined = MESH_AXIS.findall(named[2])
        return math.prod(int(part or sizes[name]) for name, _, part in joined)
    return devices


def array_bytes(shape: str) -> Iterable[float]:
    """Yields the bytes of every array of a shape."""
    for kind, dims in ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        yield bits / 8 * math.prod(int(dim) for dim in dims.split(",") if dim)


def total_bytes(found: Iterable[Any]) -> float:
    return sum(collective.bytes for collective in found)
