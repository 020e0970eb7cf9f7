"""Quantized kernels: codes and scales where a kernel would be, and the surgery between the two.

A model does not change: its projections use the leaves `kernel_int8`, `kernel_int4` or
`kernel_nf4`, with `kernel_scales`, where they are (`lm.layers.projection.Projection`). Everything
here is a function of parameters.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.paths import flatten, unflatten
from lm.models import params as P
from lm.models.kernels import Sides, kernels, targeted
from lm.ops import quantize as Q

Array = jax.Array
Params = Mapping[str, Any]
Axes = Mapping[str, tuple[str | None, ...]]


def quantize(model: nn.Module, params: Params, kind: str, targets: Sequence[str] = ("*",)) -> dict:
    """Returns parameters with codes and scales in place of kernels.

    Args:
      model: a model value.
      params: its parameters, of arrays, or traced; an adapter beside a kernel stays as it is.
      kind: 'int8', 'int4' or 'nf4', see `lm.ops.quantize`.
      targets: globs over paths of kernels of projections; embeddings and the head have none.

    Raises:
      ValueError: for another kind, a target that fits no kernel, a kernel that is quantized
        already, or one of 4 bits with an odd number of inputs.
    """
    Q.check_kind(kind)
    flat = dict(flatten(params))
    for path in targeted(model, targets):
        if path not in flat:
            raise ValueError(f"{path} is quantized already: dequantize it first")
        sides = kernels(model)[path]
        inputs = range(sides.lead, sides.lead + sides.inputs)
        try:
            codes, scales = Q.quantize(jnp.asarray(flat.pop(path)), kind, inputs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        flat |= {f"{path}_{kind}": codes, f"{path}_scales": scales}
    return unflatten(flat)


def dequantize(model: nn.Module, params: Params) -> dict:
    """Returns parameters with fp32 kernels in place of codes and scales, that compute the same."""
    flat = dict(flatten(params))
    for path in stored(flat):
        flat[path] = take(flat, path, axis_of(kernels(model)[path]))
    return unflatten(flat)


def abstract(
    model: nn.Module, params: Params, kind: str, targets: Sequence[str] = ("*",)
) -> P.Params:
    """Returns the shapes of what `quantize` returns; takes no memory."""
    return jax.eval_shape(lambda params: quantize(model, params, kind, targets), params)


def logical_axes(model: nn.Module) -> Axes:
    """Returns path -> logical axes of the parameters, and of what may lie in place of kernels.

    Codes lie as their kernel does. Scales are divided by its outputs and are on all devices along
    its inputs, where there are few of them.
    """
    axes = dict(flatten(P.logical_axes(model)))
    for path, sides in kernels(model).items():
        own = axes[path]
        axes |= {f"{path}_{kind}": own for kind in Q.KINDS}
        outputs = own[sides.lead + sides.inputs :]
        axes[f"{path}_scales"] = (*own[: sides.lead], *[None] * sides.inputs, *outputs)
    return axes


def is_quantized(path: str) -> bool:
    """Whether a leaf is the codes or the scales of a kernel."""
    return kernel_path(path) != path


def kernel_path(path: str) -> str:
    """Returns the path of the kernel that a leaf is the codes or the scales of, or its own path."""
    kernel, _, kind = path.rpartition("_")
    return kernel if kind in (*Q.KINDS, "scales") and kernel.endswith("kernel") else path


def stored(flat: Iterable[str]) -> set[str]:
    """Returns the paths of the kernels that are quantized, from the paths of all leaves."""
    return {kernel_path(path) for path in flat if is_quantized(path)}


def axis_of(sides: Sides) -> int:
    """Returns the last input dimension of a kernel, along which it is quantized in groups."""
    return sides.lead + sides.inputs - 1


def leaf_of(flat: Mapping[str, Any], path: str) -> Any:
    """Returns the kernel at `path`, or its codes, which have as many dimensions."""
    return flat[path] if path in flat else flat[f"{path}_{_kind(flat, path)}"]


def shape_of(flat: Mapping[str, Any], path: str, axis: int) -> tuple[int, ...]:
    """Returns the shape of the kernel at `path`, quantized or not."""
    if path in flat:
        return flat[path].shape
    kind = _kind(flat, path)
    return Q.unpacked_shape(flat[f"{path}_{kind}"].shape, kind, axis)


def kernel_of(flat: Mapping[str, Any], path: str, axis: int) -> Any:
    """Returns the kernel at `path`, dequantized where it is quantized along `axis`."""
    if path in flat:
        return flat[path]
    kind = _kind(flat, path)
    codes, scales = flat[f"{path}_{kind}"], flat[f"{path}_scales"]
    return Q.dequantize(jnp.asarray(codes), jnp.asarray(scales), kind, axis)


def take(flat: MutableMapping[str, Any], path: str, axis: int) -> Any:
    """Returns what `kernel_of` does, and removes what was there."""
    kernel = kernel_of(flat, path, axis)
    for name in [path, f"{path}_scales", *(f"{path}_{kind}" for kind in Q.KINDS)]:
        flat.pop(name, None)
    return kernel


def _kind(flat: Mapping[str, Any], path: str) -> str | None:
    return next((kind for kind in Q.KINDS if f"{path}_{kind}" in flat), None)
