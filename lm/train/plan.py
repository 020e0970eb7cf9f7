"""What a run will cost, worked out before its first step."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.mesh import target_platform
from lm.core.paths import flatten
from lm.models import quantized
from lm.ops.attention import Choice
from lm.train.optimizer import is_matrix
from lm.train.state import Recipe, TrainState, is_offloaded


class Chip(NamedTuple):
    """What a device can do, from its vendor's data sheet.

    Attributes:
      flops: dense bf16 floating point operations per second.
      bandwidth: of its memory, bytes per second.
      memory: bytes.
    """

    flops: float
    bandwidth: float
    memory: float


# By the beginning of what jax calls the device; of TPU v2 and v3 that is a core, half of a chip.
CHIPS = {
    "TPU v2": Chip(23e12, 350e9, 8e9),
    "TPU v3": Chip(61e12, 450e9, 16e9),
    "TPU v4": Chip(275e12, 1228e9, 32e9),
    "TPU v5 lite": Chip(197e12, 819e9, 16e9),
    "TPU v5e": Chip(197e12, 819e9, 16e9),
    "TPU v5": Chip(459e12, 2765e9, 95e9),
    "TPU v5p": Chip(459e12, 2765e9, 95e9),
    "TPU v6 lite": Chip(918e12, 1640e9, 32e9),
    "TPU v6e": Chip(918e12, 1640e9, 32e9),
    "NVIDIA A100": Chip(312e12, 1555e9, 40e9),
    "NVIDIA H100": Chip(989e12, 3350e9, 80e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 141e9),
}

# What the widest activation of a micro-batch may take on a CPU.
CACHE_BYTES = 1 << 23


@dataclass(frozen=True)
class Cost:
    """What the compiler says about a step, of each device; None where it does not.

    Attributes:
      temporary_bytes: gradients and activations, as it laid them out.
      argument_bytes: parameters, optimizer state and batch.
      output_bytes: new parameters and optimizer state; they take the place of the old ones.
    """

    temporary_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None

    @classmethod
    def of(cls, compiled: Any) -> "Cost":
        """Returns the cost of a compiled function."""
        memory = compiled.memory_analysis()
        if memory is None:
            return cls()
        return cls(
            memory.temp_size_in_bytes,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
        )


@dataclass(frozen=True)
class Plan:
    """What is known before step 0.

    Attributes:
      num_trained, num_frozen: parameters.
      state_bytes: parameters and optimizer state, all devices together, each counted once.
      cost: of the compiled step.
      tokens_per_step: places of a batch, padding included.
      flops_per_step: see `model_flops`.
      peak_flops: floating point operations per second that all devices together can do.
      peak_source: where that number is from.
      chip: of the devices, all alike, where it is known.
      lines: further facts, name -> text.
    """

    num_trained: int
    num_frozen: int
    state_bytes: int
    cost: Cost
    tokens_per_step: int
    flops_per_step: float
    peak_flops: float
    peak_source: str
    chip: Chip | None
    lines: Mapping[str, str]

    @property
    def roofline(self) -> tuple[float, float] | None:
        """Seconds that the products of a step, and its traffic with memory, take at the least.

        The step takes no less than the longer of them (Williams et al., 2009). Of the traffic only
        what cannot be spared counts: what goes in is read once, and what comes out written once.
        None where the chip is not known, or what goes in.
        """
        read, written = self.cost.argument_bytes, self.cost.output_bytes
        if self.chip is None or read is None or written is None:
            return None
        products = self.flops_per_step / self.peak_flops
        return products, (read + written) / self.chip.bandwidth

    def __str__(self) -> str:
        of_step = self.cost.temporary_bytes
        temporaries = (
            "" if of_step is None else f", {mega(of_step)} of gradients and activations per device"
        )
        rows = {
            "parameters": f"{self.num_trained:,} trained, {self.num_frozen:,} frozen",
            "memory": f"{mega(self.state_bytes)} of parameters and optimizer{temporaries}",
            "tokens per step": f"{self.tokens_per_step:,} with padding",
            "FLOPs per step": f"{self.flops_per_step:.3g} "
            f"(at least {self.flops_per_step / self.peak_flops:.2g} s at "
            f"{self.peak_flops:.3g} per second, {self.peak_source})",
            **self.bounds(),
            **self.lines,
        }
        width = max(map(len, rows))
        return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())

    def bounds(self) -> dict[str, str]:
        """Returns what the chip and the compiler say together: the bound of a step, what fits."""
        if self.chip is None or self.roofline is None:
            return {}
        products, traffic = self.roofline
        seconds = max(products, traffic)
        used = (self.cost.argument_bytes or 0) + (self.cost.temporary_bytes or 0)
        return {
            "roofline": f"{seconds:.2g} s a step at the least ({products:.2g} s of products, "
            f"{traffic:.2g} s of reading and writing the state): at most "
            f"{products / seconds:.0%} MFU, {self.tokens_per_step / seconds:,.0f} tokens/s",
            "fits" if used <= self.chip.memory else "DOES NOT FIT": f"{mega(used)} of "
            f"{mega(self.chip.memory)} per device",
        }


def mega(num_bytes: float) -> str:
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
    cost: Cost,
    lines: Mapping[str, str],
    devices: Sequence[Any],
) -> Plan:
    """Returns the plan of a run.

    Args:
      recipe: the run's.
      state: of arrays or shapes.
      shape: (B, T) of a global batch.
      cost: of the compiled step.
      lines: further facts to print.
      devices: that it is compiled for.
    """
    # Of a quantized kernel the weights are counted, and not the bytes that hold its codes.
    shapes = jax.eval_shape(partial(quantized.dequantize, recipe.model), state.params)
    trained, frozen = recipe.split(shapes)
    peak, source = peak_flops(devices)
    return Plan(
        num_trained=size(trained),
        num_frozen=size(frozen),
        state_bytes=num_bytes(state.params) + num_bytes(state.opt_state),
        cost=cost,
        tokens_per_step=math.prod(shape),
        flops_per_step=model_flops(trained, frozen, *shape),
        peak_flops=peak,
        peak_source=source,
        chip=chip_of(devices[0])[1],
        lines=lines,
    )


def offload_line(asked: Recipe, recipe: Recipe, state: TrainState) -> dict[str, str]:
    """Returns what lies in the hosts' memory of a state, or that nothing does though it was asked.

    Args:
      asked: the recipe of the experiment.
      recipe: that of its devices (`lm.train.state.for_devices`).
      state: of arrays or shapes.
    """
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if is_offloaded(recipe, leaf)]
    if moments:
        return {"offloaded": f"{mega(num_bytes(moments))} of optimizer state in the hosts' memory"}
    if asked.offload_optimizer or asked.remat != recipe.remat:
        return {"offloaded": "nothing: the memory of these devices is their hosts'"}
    return {}


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
    if target_platform() != "cpu":
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


def chip_of(device: Any) -> tuple[str, Chip | None]:
    """Returns the name and the data sheet of a device; '' and None if it is not known."""
    name = max((n for n in CHIPS if device.device_kind.startswith(n)), key=len, default="")
    return name, CHIPS.get(name)


def peak_flops(devices: Sequence[Any]) -> tuple[float, str]:
    """Returns what the devices together can do per second, and where the number is from.

    Known accelerators are looked up. Anything else, a CPU above all, is measured by the fastest of
    a few square products; devices that share one host's cores are then counted once.
    """
    name, chip = chip_of(devices[0])
    if chip is not None:
        return chip.flops * len(devices), f"the data sheet of {len(devices)} x {name}"
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
