"""What an accelerator type is: its chips, how they lie, its machines, and what they boot.

Sources, read on 2026-11-22: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e for chips, memory and
shapes, and /runtimes for the runtime versions. v4 and v5p count TensorCores in the name of a type,
v5e and v6e count chips.
"""

import difflib
from dataclasses import dataclass

_CUBES = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
    4096: "8x16x16",
}
_SQUARES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
# Of one machine: 8 chips of v5e and v6e come on one machine alone, and on machines of 4 in larger
# slices.
_CHIPS_OF_ONE_WORKER = 8
_CHIPS_OF_A_WORKER = 4


@dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
      name: as `lm plan --topology` has it.
      prefix: of its accelerator types.
      cores_per_chip: TensorCores.
      counts_cores: whether the number in a type's name is of cores, and not of chips.
      memory: of a chip, in GiB.
      runtime: what its machines boot.
      shapes: number in the type's name -> how the chips lie.
    """

    name: str
    prefix: str
    cores_per_chip: int
    counts_cores: bool
    memory: int
    runtime: str
    shapes: dict[int, str]


GENERATIONS = (
    Generation("v4", "v4", 2, True, 32, "tpu-ubuntu2204-base", _CUBES),
    Generation("v5e", "v5litepod", 1, False, 16, "v2-alpha-tpuv5-lite", _SQUARES),
    Generation(
        "v5p",
        "v5p",
        2,
        True,
        95,
        "v2-alpha-tpuv5",
        {**_CUBES, 8192: "16x16x16", 12288: "16x16x24"},
    ),
    Generation("v6e", "v6e", 1, False, 32, "v2-alpha-tpuv6e", _SQUARES),
)


@dataclass(frozen=True)
class Topology:
    """A slice that can be asked for.

    Attributes:
      accelerator_type: its name for gcloud.
      generation: of its chips.
      shape: how they lie, such as '4x4'.
      chips: how many.
      workers: machines, each with a share of the chips and one process of ours.
    """

    accelerator_type: str
    generation: Generation
    shape: str
    chips: int
    workers: int

    @property
    def cores(self) -> int:
        """TensorCores of all chips."""
        return self.chips * self.generation.cores_per_chip

    def __str__(self) -> str:
        memory = self.generation.memory
        return (
            f"{self.accelerator_type}: {count(self.chips, 'chip')} "
            f"({self.generation.name}:{self.shape}), {count(self.cores, 'core')}, {memory} GiB a "
            f"chip and {memory * self.chips} in all, {count(self.workers, 'worker')}"
        )


def count(number: int, what: str) -> str:
    """Returns '1 chip', '2 chips'."""
    return f"{number} {what}{'s' * (number != 1)}"


def all_topologies() -> dict[str, Topology]:
    """Returns accelerator type -> topology, of every type there is a preset for."""
    found = {}
    for generation in GENERATIONS:
        for number, shape in generation.shapes.items():
            chips = number // generation.cores_per_chip if generation.counts_cores else number
            one = _CHIPS_OF_A_WORKER if generation.counts_cores else _CHIPS_OF_ONE_WORKER
            workers = 1 if chips <= one else chips // _CHIPS_OF_A_WORKER
            name = f"{generation.prefix}-{number}"
            found[name] = Topology(name, generation, shape, chips, workers)
    return found


def topology_of(accelerator_type: str) -> Topology:
    """Returns the preset of an accelerator type; ValueError with the nearest one there is."""
    known = all_topologies()
    if accelerator_type in known:
        return known[accelerator_type]
    # What people say is v5e; what gcloud calls it is v5litepod.
    asked = accelerator_type.lower().replace("v5e", "v5litepod")
    near = difflib.get_close_matches(asked, known, 1, cutoff=0.0)[0]
    prefix = known[near].generation.prefix
    sizes = ", ".join(str(size) for size in known[near].generation.shapes)
    raise ValueError(
        f"there is no accelerator type {accelerator_type!r}: did you mean {near}? "
        f"{prefix} comes in {sizes}"
    )
