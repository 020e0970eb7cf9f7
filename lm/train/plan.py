"""What a run will cost, worked out before its first step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lm.core.batch import Batch
from lm.core.mesh import VOCAB, kept_whole, target_platform
from lm.core.paths import flatten
from lm.models import quantized
from lm.ops.attention import Choice
from lm.train.chips import Chip, chip_of, peak_flops
from lm.train.hlo import Collective, collectives, total_bytes
from lm.train.optimizer import is_matrix
from lm.train.state import (
    Recipe,
    TrainState,
    axes_of,
    is_offloaded,
    state_shardings,
    strip,
)

# What the widest activation of a micro-batch may take on a CPU.
CACHE_BYTES = 1 << 24


@dataclass(frozen=True)
class Cost:
    """What the compiler says about a step, of each device; None where it does not.

    Attributes:
      temporary_bytes: gradients and activations, as it laid them out.
      argument_bytes: parameters, optimizer state and batch.
      output_bytes: new parameters and optimizer state; they take the place of the old ones.
      collectives: between devices.
    """

    temporary_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    collectives: tuple[Collective, ...] = ()

    @classmethod
    def of(cls, compiled: Any, with_collectives: bool = False) -> "Cost":
        """Returns the cost of a compiled function; its collectives take reading all its text."""
        memory = compiled.memory_analysis()
        if memory is None:
            return cls()
        return cls(
            memory.temp_size_in_bytes,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            collectives(compiled.as_text()) if with_collectives else (),
        )

    @property
    def used_bytes(self) -> int:
        return (self.argument_bytes or 0) + (self.temporary_bytes or 0)


class DoesNotFit(ValueError):
    """A step that the compiler finds no room for."""


class Roofline(NamedTuple):
    """Seconds that each part of a step takes at the least; the step takes the longest of them.

    Attributes:
      products: multiplying, what remat computes again included.
      traffic: reading what goes in once, and writing what comes out once.
      links: sending between chips, with all of a chip's links busy.
    """

    products: float
    traffic: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self)


@dataclass(frozen=True)
class Plan:
    """What is known before step 0.

    Attributes:
      num_trained, num_frozen: parameters.
      state_bytes: parameters and optimizer state, all devices together, each counted once.
      cost: of the compiled step.
      tokens_per_step: places of a batch, padding included.
      flops_per_step: see `model_flops`.
      recomputed_flops: of a step, see `recomputed_flops`.
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
    recomputed_flops: float
    peak_flops: float
    peak_source: str
    chip: Chip | None
    lines: Mapping[str, str]

    @property
    def roofline(self) -> Roofline | None:
        """What a step takes at the least (Williams et al., 2009).

        Of the traffic with memory only what cannot be spared counts. None where the chip is not
        known, or what goes in.
        """
        read, written = self.cost.argument_bytes, self.cost.output_bytes
        if self.chip is None or read is None or written is None:
            return None
        links = self.chip.num_links * self.chip.link
        return Roofline(
            (self.flops_per_step + self.recomputed_flops) / self.peak_flops,
            (read + written) / self.chip.bandwidth,
            total_bytes(self.cost.collectives) / links if links else 0.0,
        )

    @property
    def mfu_bound(self) -> float:
        """The largest share of the peak that `flops_per_step` can reach."""
        assert self.roofline is not None
        return self.flops_per_step / self.peak_flops / self.roofline.seconds

    @property
    def fits(self) -> bool:
        """Whether a device has room for the step; True where its memory is not known."""
        return self.chip is None or self.cost.used_bytes <= self.chip.memory

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
        products, traffic, links = self.roofline
        seconds, cost = self.roofline.seconds, self.cost
        again = f", {self.recomputed_flops:.3g} FLOPs of them by remat" * (
            self.recomputed_flops > 0
        )
        sending = f", {links:.2g} s of sending between chips" if links else ""
        rows = {
            "roofline": f"{seconds:.2g} s a step at the least ({products:.2g} s of products{again}"
            f", {traffic:.2g} s of reading and writing the state{sending})",
            "at most": f"{self.mfu_bound:.0%} MFU, {self.tokens_per_step / seconds:,.0f} tokens/s, "
            f"{86400 * self.tokens_per_step / seconds:.3g} tokens a day",
            "fits" if self.fits else "DOES NOT FIT": f"{mega(cost.used_bytes)} of "
            f"{mega(self.chip.memory)} per device: {mega(cost.argument_bytes or 0)} of arguments, "
            f"{mega(cost.temporary_bytes or 0)} of temporaries; {mega(cost.output_bytes or 0)} of "
            "output in place of arguments",
        }
        if cost.collectives:
            rows["collectives"] = "; ".join(
                f"{each.count:,} {each.kind} of {mega(each.bytes)}" for each in cost.collectives
            )
            rows["collectives"] += " in all, sent by each device in a step"
        if links:
            number, speed = self.chip.num_links, self.chip.link
            rows["links"] = (
                f"{links:.2g} s if all {number} of a chip are busy, {links * number / 2:.2g} s in "
                f"rings along one axis, at {speed / 1e9:.0f} GB/s each way by the data sheet"
            )
        return rows


def places_of(batch: Batch) -> tuple[int, int]:
    """Returns the rows of a batch, of arrays or shapes, and their length; a choice is a row."""
    *rows, length = batch.tokens.shape
    return math.prod(rows), length


def mega(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def bytes_here(tree: Any, shardings: Any) -> int:
    """Returns the bytes of a tree's leaves on one device."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))
    )


def layout_lines(recipe: Recipe, mesh: Mesh, state: TrainState) -> dict[str, str]:
    """Returns what the plan of a run says about where its state lies, name -> text.

    Args:
      recipe, mesh: of the run.
      state: as it is laid out, of arrays or of shapes.
    """
    if mesh.size == 1:
        return {}
    axes, leaves = axes_of(recipe.model), flatten(state.params)
    shardings = state_shardings(recipe, mesh, state)
    shares = {
        "parameters": bytes_here(state.params, shardings.params),
        "optimizer": bytes_here(state.opt_state, shardings.opt_state),
    }
    text = ", ".join(f"{mega(share)} of {name}" for name, share in shares.items())
    lines = {"memory per device": text}
    known = {path: (axes[path], leaf.shape) for path, leaf in leaves.items() if path in axes}
    for spec, shape in known.values():
        padded = [size for size, axis in zip(shape, spec) if axis == VOCAB]
        size = recipe.model.vocab_size  # pyright: ignore
        if padded and padded[0] > size:
            lines["vocabulary"] = f"{size:,} padded to {padded[0]:,}, which the mesh divides"
        if (heads := kept_whole(mesh, spec, shape)) is not None:
            lines["key and value heads"] = f"all {heads} on every device, being fewer than tensor"
    return lines


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
    shapes = jax.eval_shape(
        lambda params: quantized.dequantize(recipe.model, strip(recipe, params, params)),
        state.params,
    )
    trained, frozen = recipe.split(shapes)
    peak, source = peak_flops(devices)
    return Plan(
        num_trained=size(trained),
        num_frozen=size(frozen),
        state_bytes=num_bytes(state.params) + num_bytes(state.opt_state),
        cost=cost,
        tokens_per_step=math.prod(shape),
        flops_per_step=model_flops(trained, frozen, *shape),
        recomputed_flops=recomputed_flops(shapes, recipe.remat, *shape),
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

    per_token = 6 * matrices(trained) + 4 * matrices(frozen) + 12 * query_features(every) * length
    return float(batch_size * length * per_token)


def recomputed_flops(params: Any, remat: str, batch_size: int, length: int) -> float:
    """Returns the floating point operations of a step that a remat policy adds to `model_flops`.

    'full' computes the repeats of the stack again but for their last product, whose outcome no
    gradient needs: B T (2 P + 4 sum_layers N H T), P counting their kernels without 'down'. 'dots'
    and 'offload' compute the attention again, since scores are no products of projections:
    B T (4 sum_layers N H T). What a backend of attention computes again by itself is left out.

    Args:
      params: nested dict of arrays or shapes.
      remat: a name in `lm.models.stack.REMAT_POLICIES`.
      batch_size, length: B and T.
    """
    if remat == "none":
        return 0.0
    repeated = {path: leaf for path, leaf in flatten(params).items() if "/pattern/" in path}
    kernels = sum(
        math.prod(leaf.shape)
        for path, leaf in repeated.items()
        if is_matrix(path) and remat == "full" and "/down/" not in path
    )
    return float(batch_size * length * (2 * kernels + 4 * query_features(repeated) * length))


def query_features(leaves: Mapping[str, Any]) -> int:
    """Returns the sum over layers of N H, of leaves by path."""
    return sum(
        math.prod(leaf.shape[:-3]) * leaf.shape[-2] * leaf.shape[-1]
        for path, leaf in leaves.items()
        if path.endswith("/q/kernel")
    )
