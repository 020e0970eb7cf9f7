"""Presets of accelerator types against tables copied by hand from Google's documentation."""

import math

import pytest

from tpu.topology import all_topologies, topology_of

# type, shape, chips, workers, cores, GiB of a chip, runtime version. v4 and v5p: "Topology, Cores,
# Chips, Hosts"; v5e and v6e: chips, and machines ("VMs") of the table of v6e.
DOCUMENTED = """
v4-8           2x2x1     4    1     8     32 tpu-ubuntu2204-base
v4-32          2x2x4     16   4     32    32 tpu-ubuntu2204-base
v4-128         4x4x4     64   16    128   32 tpu-ubuntu2204-base
v5litepod-1    1x1       1    1     1     16 v2-alpha-tpuv5-lite
v5litepod-4    2x2       4    1     4     16 v2-alpha-tpuv5-lite
v5litepod-8    2x4       8    1     8     16 v2-alpha-tpuv5-lite
v5litepod-16   4x4       16   4     16    16 v2-alpha-tpuv5-lite
v5litepod-32   4x8       32   8     32    16 v2-alpha-tpuv5-lite
v5litepod-256  16x16     256  64    256   16 v2-alpha-tpuv5-lite
v5p-8          2x2x1     4    1     8     95 v2-alpha-tpuv5
v5p-16         2x2x2     8    2     16    95 v2-alpha-tpuv5
v5p-64         2x4x4     32   8     64    95 v2-alpha-tpuv5
v5p-128        4x4x4     64   16    128   95 v2-alpha-tpuv5
v5p-512        4x8x8     256  64    512   95 v2-alpha-tpuv5
v5p-12288      16x16x24  6144 1536  12288 95 v2-alpha-tpuv5
v6e-1          1x1       1    1     1     32 v2-alpha-tpuv6e
v6e-8          2x4       8    1     8     32 v2-alpha-tpuv6e
v6e-16         4x4       16   4     16    32 v2-alpha-tpuv6e
v6e-256        16x16     256  64    256   32 v2-alpha-tpuv6e
"""


@pytest.mark.parametrize("row", [line.split() for line in DOCUMENTED.strip().splitlines()])
def test_as_documented(row):
    topology = topology_of(row[0])
    generation = topology.generation
    numbers = [topology.chips, topology.workers, topology.cores, generation.memory]
    assert [topology.shape, *map(str, numbers), generation.runtime] == row[1:]


def test_shapes_hold_their_chips():
    assert len(all_topologies()) == 38
    for topology in all_topologies().values():
        assert math.prod(map(int, topology.shape.split("x"))) == topology.chips
        assert topology.chips % topology.workers == 0


@pytest.mark.parametrize(
    "wrong, near",
    [("v5e-16", "v5litepod-16"), ("v5litepod-12", "v5litepod-1"), ("v6-8", "v6e-8")],
)
def test_an_unknown_type_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"no accelerator type '{wrong}': did you mean {near}"):
        topology_of(wrong)
