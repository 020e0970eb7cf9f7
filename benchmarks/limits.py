"""What the machine can do: the fastest products and copies found, measured in the same rounds."""

import math
import time
from collections.abc import Callable
from typing import Any

from benchmarks.worker import Work
from lm.core.runtime import prepare

prepare()

import jax
import jax.numpy as jnp

# GFLOP/s of products by dtype, and GB/s; the report reads them by these names.
NAMES = ("fp32", "bf16", "read", "copy")
REPEATS = 5


def best(function: Callable[[], Any], work: float) -> float:
    """Returns the largest rate of some repetitions, in units of 1e9 a second."""
    function()
    seconds = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds = min(seconds, time.perf_counter() - start)
    return work / seconds / 1e9


def make() -> Work:
    """Measures each limit by jax, and by torch where it is installed, and takes the larger."""
    on_cpu = jax.default_backend() == "cpu"
    size, words = (2048, 1 << 25) if on_cpu else (8192, 1 << 30)
    by_jax = jax_rates(size, words)
    by_torch = torch_rates(size, words) if on_cpu else {}

    def run(count: int) -> list[dict[str, float]]:
        return [
            {
                name: max(rate() for rate in (by_jax.get(name), by_torch.get(name)) if rate)
                for name in NAMES
            }
            for _ in range(count)
        ]

    about = f"products of {size} x {size}, arrays of {words >> 20} M fp32 numbers"
    return Work(run, {"settings": about})


def jax_rates(size: int, words: int) -> dict[str, Callable[[], float]]:
    multiply = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    a = jnp.ones((size, size))
    lower = a.astype(jnp.bfloat16)
    # A matrix times a vector reads as decoding does.
    matrix, vector = jnp.ones((words >> 12, 1 << 12)), jnp.ones(1 << 12)
    times, double = jax.jit(jnp.dot), jax.jit(lambda matrix: 2 * matrix)
    return {
        "fp32": lambda: best(lambda: multiply(a).block_until_ready(), 2 * size**3),
        "bf16": lambda: best(lambda: multiply(lower).block_until_ready(), 2 * size**3),
        "read": lambda: best(lambda: times(matrix, vector).block_until_ready(), 4 * words),
        "copy": lambda: best(lambda: double(matrix).block_until_ready(), 8 * words),
    }


def torch_rates(size: int, words: int) -> dict[str, Callable[[], float]]:
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    a, out = torch.ones(size, size), torch.empty(size, size)
    lower, lower_out = a.bfloat16(), out.bfloat16()
    long, double = torch.ones(words), torch.empty(words)
    return {
        "fp32": lambda: best(lambda: torch.mm(a, a, out=out), 2 * size**3),
        "bf16": lambda: best(lambda: torch.mm(lower, lower, out=lower_out), 2 * size**3),
        "read": lambda: best(lambda: long.sum(), 4 * words),
        "copy": lambda: best(lambda: torch.mul(long, 2, out=double), 8 * words),
    }
