"""What devices can do: data sheets, and what is measured where there is none."""

import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GIB = 1 << 30


class Chip(NamedTuple):
    """What a device can do, from its vendor's data sheet.

    Attributes:
      flops: dense bf16 floating point operations per second.
      bandwidth: of its memory, bytes per second.
      memory: bytes.
      num_links: to other chips, of the interconnect within a slice; 0 if it is not known.
      link: bytes per second that one of them carries in each direction.
    """

    flops: float
    bandwidth: float
    memory: float
    num_links: int = 0
    link: float = 0.0


# By the beginning of what jax calls the device; of TPU v2 and v3 that is a core, half of a chip.
# Links of TPUs are from cloud.google.com/tpu/docs/v5e, v5p and v6e, which give the bandwidth of all
# links of a chip in both directions: 400, 1200 and 800 GB/s; of v4 from Jouppi et al. (2023).
CHIPS = {
    "TPU v2": Chip(23e12, 350e9, 8 * GIB),
    "TPU v3": Chip(61e12, 450e9, 16 * GIB),
    "TPU v4": Chip(275e12, 1228e9, 32 * GIB, 6, 50e9),
    "TPU v5 lite": Chip(197e12, 819e9, 16 * GIB, 4, 50e9),
    "TPU v5e": Chip(197e12, 819e9, 16 * GIB, 4, 50e9),
    "TPU v5": Chip(459e12, 2765e9, 95 * GIB, 6, 100e9),
    "TPU v5p": Chip(459e12, 2765e9, 95 * GIB, 6, 100e9),
    "TPU v6 lite": Chip(918e12, 1640e9, 32 * GIB, 4, 100e9),
    "TPU v6e": Chip(918e12, 1640e9, 32 * GIB, 4, 100e9),
    "NVIDIA A100": Chip(312e12, 1555e9, 40e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 80e9),
    "NVIDIA H100": Chip(989e12, 3350e9, 80e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 141e9),
}
# What `lm plan --device` calls them.
DEVICES = {
    "a100": "NVIDIA A100",
    "a100-80gb": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
}


def chip_of(device: Any) -> tuple[str, Chip | None]:
    """Returns the name and the data sheet of a device; '' and None if it is not known."""
    name = max((n for n in CHIPS if device.device_kind.startswith(n)), key=len, default="")
    return name, CHIPS.get(name)


def peak_flops(devices: Sequence[Any]) -> tuple[float, str]:
    """Returns what the devices together can do per second, and where the number is from.

    Known accelerators are looked up. Anything else, a CPU above all, is measured by the fastest of
    a few square products. Devices of one process share its host's cores, and count once; processes
    of one host measure at the same time, and so each finds its share.
    """
    name, chip = chip_of(devices[0])
    if chip is not None:
        return chip.flops * len(devices), f"the data sheet of {len(devices)} x {name}"
    on_cpu = devices[0].platform == "cpu"
    size = 1024 if on_cpu else 8192
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    # A product that depends on the one before cannot be overlapped with it or optimised away.
    mine = next(d for d in devices if d.process_index == jax.process_index())
    x = jax.device_put(jnp.ones((size, size), dtype), mine)
    multiply = jax.jit(lambda a: (a @ x) * (1 / size))
    multiply(x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    count = len({device.process_index for device in devices}) if on_cpu else len(devices)
    return (
        2 * size**3 / best * count,
        f"measured here by a {size} x {size} {dtype.__name__} product",
    )


def measure_host(flops: float) -> Chip:
    """Returns this machine's CPU as a chip: the bandwidth is measured, the memory asked for.

    Args:
      flops: as `peak_flops` measured them.
    """
    source = np.ones(1 << 25)  # 256 MiB, more than caches hold.
    target = np.empty_like(source)
    best = math.inf
    for _ in range(4):  # The first meets pages that are not there yet.
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(flops, 2 * source.nbytes / best, memory)
