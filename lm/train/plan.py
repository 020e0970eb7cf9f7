"""What a run will cost, worked out before its first step."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.paths import flatten
from lm.models import quantized
from lm.ops.attention import Choice
from lm.train.optimizer import is_matrix
from lm.train.state import Recipe, TrainState

# Dense bf16 products per second of one chip, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v2": 23e12,
    "TPU v3": 61e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


# What the widest activation of a micro-batch may take on a CPU.
CACHE_BYTES = 1 << 23


@dataclass(frozen=True)
class Plan:
    """What is known before step 0.

    Attributes:
      num_trained, num_frozen: parameters.
      state_bytes: parameters and optimizer state, all devices together, each counted once.
      temporary_bytes: gradients and activations of a step on each device, as the compiler laid
        them out; None where it does not say.
      tokens_per_step: places of a batch, padding included.
      flops_per_step: see `model_flops`.
      peak_flops: floating point operations per second that all devices together can do.
      peak_source: where that number is from.
      lines: further facts, name -> text.
    """

    num_trained: int
    num_frozen: int
    state_bytes: int
    temporary_bytes: int | None
    tokens_per_step: int
    flops_per_step: float
    peak_flops: float
    peak_source: str
    lines: Mapping[str, str]

    def __str__(self) -> str:
        temporaries = (
            ""
            if self.temporary_bytes is None
            else f", {mega(self.temporary_bytes)} of gradients and activations per device"
        )
        rows = {
            "parameters": f"{self.num_trained:,} trained, {self.num_frozen:,} frozen",
            "memory": f"{mega(self.state_bytes)} of parameters and optimizer{temporaries}",
            "tokens per step": f"{self.tokens_per_step:,} with padding",
            "FLOPs per step": f"{self.flops_per_step:.3g} "
            f"(at least {self.flops_per_step / self.peak_flops:.2g} s at "
            f"{self.peak_flops:.3g} per second, {self.peak_source})",
            **self.lines,
        }
        width = max(map(len, rows))
        return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())


def mega(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def attention_line(choices: Sequence[Choice]) -> str:
    """Returns which backends compute the attention of a step, and why not a better one."""
    lines = [
        f"{choice.backend} ({choice.what})" + (f", not {choice.instead}" if choice.instead else "")
        for choice in dict.fromkeys(choices)
    ]
    return "; ".join(lines) or "none"


def make_plan(
    recipe: Recipe,
    state: TrainState,
    shape: tuple[int, int],
    temporary_bytes: int | None,
    lines: Mapping[str, str],
) -> Plan:
    """Returns the plan of a run.

    Args:
      recipe: the run's.
      state: of arrays or shapes.
      shape: (B, T) of a global batch.
      temporary_bytes: of the compiled step.
      lines: further facts to print.
    """
    # Of a quantized kernel the weights are counted, and not the bytes that hold its codes.
    shapes = jax.eval_shape(partial(quantized.dequantize, recipe.model), state.params)
    trained, frozen = recipe.split(shapes)
    peak, source = peak_flops(jax.devices())
    return Plan(
        num_trained=size(trained),
        num_frozen=size(frozen),
        state_bytes=num_bytes(state.params) + num_bytes(state.opt_state),
        temporary_bytes=temporary_bytes,
        tokens_per_step=math.prod(shape),
        flops_per_step=model_flops(trained, frozen, *shape),
        peak_flops=peak,
        peak_source=source,
        lines=lines,
    )


def choose_micro_batches(params: Any, rows: int, num_tokens: int) -> int:
    """Returns in how many parts a batch is computed where the experiment leaves it open.

    On an accelerator it is 1. On a CPU the widest activation of a part is to fit in its cache, as
    long as the gradients, which every part adds to, are not more than the activations it saves.

    Args:
      params: of the model, arrays or shapes.
      rows: of the batch, on one device.
      num_tokens: in those rows.

    Returns:
      A divisor of `rows`.
    """
    if jax.default_backend() != "cpu":
        return 1
    kernels = [leaf.shape for path, leaf in flatten(params).items() if path.endswith("/up/kernel")]
    layers = sum(math.prod(shape[:-2]) for shape in kernels)
    width = max((shape[-1] for shape in kernels), default=0)
    for parts in (parts for parts in range(1, rows + 1) if rows % parts == 0):
        tokens = num_tokens // parts
        next_saves_less = tokens * width * layers < 2 * size(params)
        if 4 * tokens * width <= CACHE_BYTES or next_saves_less:
            return parts
    return rows


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def model_flops(trained: Any, frozen: Any, batch_size: int, length: int) -> float:
    """Returns the floating point operations of one step that the mathematics asks for.

    B T (6 P_trained + 4 P_frozen + 12 sum_layers N H T), P counting the matrices that multiply
    activations: kernels, and the embedding table where the head is tied to it (Kaplan et al.,
    2020; Chowdhery et al., 2022). A frozen kernel has no gradient of its own, but passes one on.
    Recomputation, and what a causal mask would let one skip, are not counted off or in.

    Args:
      trained, frozen: nested dicts of arrays or shapes.
      batch_size, length: B and T.
    """
    every = {**flatten(trained), **flatten(frozen)}
    tied = "embed/table" in every and "head/kernel" not in every

    def matrices(tree: Any) -> int:
        return sum(
            math.prod(leaf.shape)
            for path, leaf in flatten(tree).items()
            if is_matrix(path) or (tied and path == "embed/table")
        )

    heads = sum(
        math.prod(leaf.shape[:-3]) * leaf.shape[-2] * leaf.shape[-1]
        for path, leaf in every.items()
        if path.endswith("/q/kernel")
    )
    per_token = 6 * matrices(trained) + 4 * matrices(frozen) + 12 * heads * length
    return float(batch_size * length * per_token)


def peak_flops(devices: list[Any]) -> tuple[float, str]:
    """Returns what the devices together can do per second, and where the number is from.

    Known accelerators are looked up. Anything else, a CPU above all, is measured by the fastest of
    a few square products; devices that share one host's cores are then counted once.
    """
    kind = devices[0].device_kind
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK_FLOPS[name] * len(devices), f"the data sheet of {len(devices)} x {name}"
    on_cpu = devices[0].platform == "cpu"
    size = 1024 if on_cpu else 8192
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    # A product that depends on the one before cannot be overlapped with it or optimised away.
    x = jax.device_put(jnp.ones((size, size), dtype), devices[0])
    multiply = jax.jit(lambda a: (a @ x) * (1 / size))
    multiply(x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    count = 1 if on_cpu else len(devices)
    return (
        2 * size**3 / best * count,
        f"measured here by a {size} x {size} {dtype.__name__} product",
    )
