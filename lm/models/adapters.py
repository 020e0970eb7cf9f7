"""LoRA: low-rank leaves beside the kernels that they adapt, and the surgery that puts them there.

A model does not change: its projections use the leaves `lora_a`, `lora_b`, `lora_scale` and
`lora_m` where they are (`lm.layers.projection.Projection`). Everything here is a function of
parameters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.init import VarianceScaling
from lm.core.paths import flatten, matches, partition, unflatten
from lm.core.paths import merge as join
from lm.models import params as P
from lm.models import quantized
from lm.models.kernels import Sides, kernels, targeted

Array = jax.Array
Params = Mapping[str, Any]
# U(-1 / sqrt(inputs), 1 / sqrt(inputs)), as the reference implementation draws it.
A_INIT = VarianceScaling(1 / 3, "in", "uniform")


@dataclass(frozen=True)
class Rank:
    """The rank of some kernels, where it is not that of all.

    Attributes:
      pattern: glob over paths of kernels.
      rank: 0 leaves a kernel as it is.
      repeats: repeats of the stack that it holds for, from 0; None is all of them.
    """

    pattern: str
    rank: int
    repeats: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LoRA:
    """Which kernels get an adapter W + scale A B, and of what rank (Hu et al., 2022).

    Attributes:
      rank: R, columns of A and rows of B.
      alpha: the scale is alpha / R.
      targets: globs over paths of kernels; '*/q/kernel' is every query kernel.
      dropout: rate on the adapter's input while it is trained.
      rank_stabilized: the scale is alpha / sqrt(R) instead (Kalajdzievski, 2023).
      dora: the lengths of the columns are leaves of their own (Liu et al., 2024).
      ranks: exceptions; the first that fits a kernel and repeat holds. Lower ranks than the
        highest of a stacked kernel are filled up with zeros, which stay zero in training.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*/q/kernel", "*/v/kernel")
    dropout: float = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    ranks: tuple[Rank, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or any(exception.rank < 0 for exception in self.ranks):
            raise ValueError(f"the rank of an adapter is 1 or more, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is at least 0 and below 1, not {self.dropout}")
        if not self.targets:
            raise ValueError("an adapter has targets, such as ('*/q/kernel', '*/v/kernel')")

    def rank_of(self, path: str, repeat: int) -> int:
        """Returns the rank for a kernel of one repeat of the stack."""
        for exception in self.ranks:
            here = exception.repeats is None or repeat in exception.repeats
            if here and matches(path, exception.pattern):
                return exception.rank
        return self.rank

    def scale(self, rank: int) -> float:
        """Returns what A B is multiplied by."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank) if rank else 0.0


def is_adapter(path: str) -> bool:
    """Whether a leaf belongs to an adapter."""
    return path.rpartition("/")[2].startswith("lora_")


def add(model: nn.Module, params: Params, lora: LoRA, key: Array) -> dict:
    """Returns parameters with a fresh adapter: A uniform, B zero, so that nothing is changed yet.

    Args:
      model: a model value.
      params: its parameters, of arrays, or traced.
      lora: which kernels, and how.
      key: typed or raw PRNG key of A.

    Raises:
      ValueError: if a target fits no kernel, an exception to the rank no target, every rank is 0,
        or the parameters hold an adapter already.
    """
    flat = dict(flatten(params))
    if any(map(is_adapter, flat)):
        raise ValueError("these parameters hold an adapter already: merge or remove it first")
    paths = targeted(model, lora.targets)
    for exception in lora.ranks:
        if not any(matches(path, exception.pattern) for path in paths):
            raise ValueError(
                f"the exception {exception.pattern!r} to the rank fits no target of the adapter; "
                f"there are {', '.join(paths)}"
            )
    for index, path in enumerate(paths):
        sides = kernels(model)[path]
        axis = quantized.axis_of(sides)
        shape = quantized.shape_of(flat, path, axis)
        lead, inputs = shape[: sides.lead], shape[sides.lead : sides.lead + sides.inputs]
        count = math.prod(lead)
        ranks = [lora.rank_of(path, repeat) for repeat in range(count)]
        most = max(ranks)
        if most == 0:
            continue
        used = (jnp.arange(most) < jnp.array(ranks)[:, None]).reshape(*lead, *[1] * len(inputs), -1)
        a_key = jax.random.fold_in(key, index)
        fan_in = math.prod(inputs)
        a = A_INIT(a_key, (*lead, *inputs, most), jnp.float32, fan_in)
        scales = [lora.scale(rank) for rank in ranks]
        beside = {
            "a": jnp.where(used, a, 0.0),
            "b": jnp.zeros((*lead, most, *shape[sides.lead + sides.inputs :]), jnp.float32),
            "scale": jnp.array(scales, jnp.float32).reshape(lead),
        }
        if lora.dora:
            kernel = quantized.kernel_of(flat, path, axis)
            beside["m"] = column_lengths(kernel.astype(jnp.float32), sides)
        flat.update(leaves_beside(path, beside))
    if not any(map(is_adapter, flat)):
        raise ValueError("every rank of the adapter is 0: give some kernel a rank")
    return unflatten(flat)


def abstract(model: nn.Module, lora: LoRA) -> P.Params:
    """Returns the shapes of a model's parameters with an adapter; errors as of `add`."""
    return jax.eval_shape(
        lambda params: add(model, params, lora, jax.random.key(0)), P.abstract(model)
    )


def leaves_beside(path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves 'a', 'b', 'scale' and 'm' of the kernel at `path`, by their paths."""
    parent = path.removesuffix("kernel")
    return {f"{parent}lora_{name}": leaf for name, leaf in leaves.items()}


def beside(flat: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Inverts `leaves_beside`: what lies beside the kernel at `path`, by short names."""
    parent = path.removesuffix("kernel")
    names = ("a", "b", "scale", "m")
    return {n: flat[f"{parent}lora_{n}"] for n in names if f"{parent}lora_{n}" in flat}


def adapted(flat: Iterable[str]) -> list[str]:
    """Returns the paths of the kernels that have an adapter, from the paths of all leaves."""
    return [f"{path[: -len('lora_a')]}kernel" for path in flat if path.endswith("/lora_a")]


def sides_of(leaves: Mapping[str, Any], kernel_ndim: int) -> Sides:
    """Returns the sides of a kernel from the adapter beside it, which must be a single one."""
    lead = leaves["scale"].ndim
    inputs = leaves["a"].ndim - lead - 1
    return Sides(lead, inputs, kernel_ndim - lead - inputs)


def product(leaves: Mapping[str, Any], shape: Sequence[int]) -> Array:
    """Returns scale A B, of the shape of the kernel, in fp32."""
    lead, inputs, _ = sides_of(leaves, len(shape))
    rank = leaves["a"].shape[-1]
    front, fan_in = shape[:lead], math.prod(shape[lead : lead + inputs])
    a = jnp.asarray(leaves["a"], jnp.float32).reshape(*front, fan_in, rank)
    b = jnp.asarray(leaves["b"], jnp.float32).reshape(*front, rank, -1)
    return (leaves["scale"][..., None, None] * (a @ b)).reshape(shape)


def column_lengths(kernel: Array, sides: Sides) -> Array:
    """Returns the Euclidean length of each output's column of a kernel."""
    inputs = tuple(range(sides.lead, sides.lead + sides.inputs))
    return jnp.sqrt(jnp.sum(kernel**2, axis=inputs))


def merge(params: Params) -> dict:
    """Returns plain parameters that compute what `params` with their adapter do.

    An adapted kernel that is quantized becomes an fp32 one; the others stay as they are.

    Raises:
      ValueError: if there is no adapter, or there are several.
    """
    flat = dict(flatten(params))
    for path in single(flat):
        leaves = beside(flat, path)
        sides = sides_of(leaves, quantized.leaf_of(flat, path).ndim)
        kernel = quantized.take(flat, path, quantized.axis_of(sides))
        whole = jnp.asarray(kernel, jnp.float32) + product(leaves, kernel.shape)
        if "m" in leaves:
            gain = leaves["m"] / column_lengths(whole, sides)
            first = range(sides.lead, sides.lead + sides.inputs)
            whole *= jnp.expand_dims(gain, tuple(first))
        flat[path] = whole.astype(kernel.dtype)
    return remove(unflatten(flat))


def unmerge(merged: Params, adapter: Params) -> dict:
    """Inverts `merge`: returns the base with the adapter beside it.

    Of a base that was quantized these are the dequantized kernels, and not the codes.

    Args:
      merged: what `merge` returned.
      adapter: the adapter's leaves, the second that `split` returns.

    Raises:
      ValueError: if the adapter is a DoRA, whose base cannot be had back from the merged kernel;
        keep the base instead. Or as of `merge`.
    """
    flat = dict(flatten(join(merged, adapter)))
    for path in single(flat):
        leaves, kernel = beside(flat, path), flat[path]
        if "m" in leaves:
            raise ValueError(
                f"{path} was merged with a DoRA, which sets the lengths of its columns, so that "
                "the base cannot be had back: keep the parameters from before"
            )
        whole = jnp.asarray(kernel, jnp.float32) - product(leaves, kernel.shape)
        flat[path] = whole.astype(kernel.dtype)
    return unflatten(flat)


def split(params: Params) -> tuple[dict, dict]:
    """Returns the base and the adapter's leaves; `lm.core.paths.merge` joins them again."""
    adapter, base = partition(params, is_adapter)
    return base, adapter


def remove(params: Params) -> dict:
    """Returns the base alone."""
    return split(params)[0]


def stack(base: Params, adapters: Sequence[Params]) -> dict:
    """Returns parameters with several adapters, for `ctx.adapter_B` to choose from by number.

    They may differ in rank, in targets and in whether they are DoRAs.

    Args:
      base: parameters without an adapter.
      adapters: the leaves of each, as `split` returns them.

    Raises:
      ValueError: if there are none, or one lies beside no kernel of this base.
    """
    flat, flats = dict(flatten(base)), [flatten(adapter) for adapter in adapters]
    paths = sorted({path for each in flats for path in adapted(each)})
    if not paths:
        raise ValueError("there is no adapter to stack")
    new = {}
    for path in paths:
        if path not in flat and path not in quantized.stored(flat):
            raise ValueError(f"an adapter is for {path}, which this base does not have")
        found = [beside(each, path) for each in flats]
        example = next(leaves for leaves in found if leaves)
        sides = sides_of(example, quantized.leaf_of(flat, path).ndim)
        kernel = quantized.kernel_of(flat, path, quantized.axis_of(sides))
        rank = max(leaves["a"].shape[-1] for leaves in found if leaves)
        dora = any("m" in leaves for leaves in found)
        full = [_padded(leaves or _nothing(example), kernel, sides, rank, dora) for leaves in found]
        names = full[0].keys()
        new.update(
            leaves_beside(path, {n: jnp.stack([f[n] for f in full], sides.lead) for n in names})
        )
    return unflatten(flat | new)


def select(params: Params, index: int) -> dict:
    """Returns the parameters with one of their several adapters.

    Raises:
      ValueError: if there are not that many.
    """
    flat = dict(flatten(params))
    for path in adapted(flat):
        leaves = beside(flat, path)
        lead = leaves["scale"].ndim - several(leaves, quantized.leaf_of(flat, path))
        if lead == leaves["scale"].ndim or not 0 <= index < leaves["scale"].shape[lead]:
            raise ValueError(f"there is no adapter {index} beside {path}")
        chosen = {name: jnp.take(leaf, index, axis=lead) for name, leaf in leaves.items()}
        flat.update(leaves_beside(path, chosen))
    return unflatten(flat)


def single(flat: Mapping[str, Any]) -> list[str]:
    """Returns the adapted kernels; ValueError if there are none, or several adapters each."""
    paths = adapted(flat)
    if not paths:
        raise ValueError("these parameters hold no adapter")
    for path in paths:
        if several(beside(flat, path), quantized.leaf_of(flat, path)):
            raise ValueError("these parameters hold several adapters: select one of them first")
    return paths


def several(leaves: Mapping[str, Any], kernel: Any) -> int:
    """Returns how many dimensions of adapters the leaves beside a kernel have, 0 or 1."""
    # Both a and b have those of layers, of adapters and of the rank; the scale the first two.
    return leaves["a"].ndim + leaves["b"].ndim - 2 - kernel.ndim - leaves["scale"].ndim


def _nothing(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: jnp.zeros_like(example[name]) for name in ("a", "b", "scale")}


def _padded(leaves: Mapping[str, Any], kernel: Any, sides: Sides, rank: int, dora: bool) -> dict:
    """Returns an adapter with a higher rank and, if asked for, with column lengths of its own."""
    missing = rank - leaves["a"].shape[-1]
    a_widths = [(0, 0)] * leaves["a"].ndim
    b_widths = [(0, 0)] * leaves["b"].ndim
    a_widths[-1] = b_widths[sides.lead] = (0, missing)
    full = dict(leaves, a=jnp.pad(leaves["a"], a_widths), b=jnp.pad(leaves["b"], b_widths))
    if dora and "m" not in leaves:
        whole = jnp.asarray(kernel, jnp.float32) + product(leaves, kernel.shape)
        full["m"] = column_lengths(whole, sides)
    return full
