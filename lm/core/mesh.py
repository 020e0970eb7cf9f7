"""The device mesh, and which of its axes each logical axis of an array lies on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.extend.backend
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None

# Logical axis of a parameter's dimension -> mesh axis or axes; what is not named is on every
# device. With the vocabulary on all stages none has more to compute than the others (Yeung et al.,
# 2024).
RULES: dict[str, MeshAxes] = {
    "layers": "stage",
    "embed": "fsdp",
    "vocab": ("stage", "tensor"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}
BATCH_AXES = ("data", "fsdp")
PLACES_AXIS = "sequence"
# What divides the places of the residual stream where tensor parallelism leaves it divided.
STREAM_AXES = (PLACES_AXIS, "tensor")
# A dimension that the mesh does not divide stays whole on every device, if it is a vocabulary
# (which training pads first), or if there are fewer key and value heads than devices.
VOCAB, KV_HEADS = "vocab", "kv_heads"
# What has no dimension of the residual stream is divided along its inner one by fsdp, too.
INNER = ("mlp", ("tensor", "fsdp"))


@dataclass(frozen=True)
class MeshShape:
    """How many devices lie along each axis of the mesh; -1, once, is all that are left.

    Attributes:
      data: copies of the parameters, each with its own rows of the batch.
      fsdp: rows of the batch, too, with the parameters divided (Zhao et al., 2023).
      tensor: heads, feed-forward and vocabulary divided (Shoeybi et al., 2019).
      sequence, expert, stage: places of a row, experts, and layers divided.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    stage: int = 1


def make_mesh(shape: MeshShape = MeshShape(), devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over all devices (or those given), with axes in the order of `MeshShape`.

    Raises:
      ValueError: if the axes' sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {field.name: getattr(shape, field.name) for field in fields(shape)}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    fits = known > 0 and len(devices) % known == 0
    if len(free) > 1 or not fits or (not free and known != len(devices)):
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise ValueError(
            f"the mesh ({asked or 'all axes 1'}) does not divide {len(devices)} devices: choose "
            "sizes whose product is that number, -1 for at most one of them"
        )
    sizes.update({name: len(devices) // known for name in free})
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Returns the sharding of a batch's rows, which come after `leading` other dimensions."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES))


def places_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what has a row's places after its rows, (B, T, ...)."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, PLACES_AXIS))


def num_batch_shards(mesh: Mesh) -> int:
    """Returns over how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def param_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], path: str
) -> NamedSharding:
    """Returns the sharding of a parameter by its logical axes.

    Raises:
      ValueError: if a dimension does not divide over its mesh axis, and may not stay whole.
    """
    return NamedSharding(mesh, PartitionSpec(*_divided(mesh, axes, shape, path)))


def _divided(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], path: str
) -> list[MeshAxes]:
    """Returns the mesh axes of each dimension; errors as of `param_sharding`."""
    spec = [RULES.get(axis or "") for axis in axes]
    for dim, (size, name) in enumerate(zip(shape, axes)):
        parts = num_parts(mesh, spec[dim])
        if size % parts == 0:
            continue
        if name != VOCAB and not (name == KV_HEADS and size < parts):
            sizes = [f"{axis}={mesh.shape[axis]}" for axis in _names(spec[dim])]
            raise ValueError(
                f"{path} of shape {tuple(shape)} has {size} along {name!r}, which "
                f"{' x '.join(sizes)} devices do not divide: choose another mesh or another size"
            )
        spec[dim] = None
    inner, both = INNER
    if inner in axes and RULES["embed"] not in spec:
        dim = list(axes).index(inner)
        if shape[dim] % num_parts(mesh, both) == 0:
            spec[dim] = both
    return spec


def _names(on: MeshAxes) -> tuple[str, ...]:
    return (on,) if isinstance(on, str) else on or ()


def num_parts(mesh: Mesh, on: MeshAxes) -> int:
    """Returns into how many parts mesh axes divide a dimension."""
    return math.prod(mesh.shape[axis] for axis in _names(on))


def padded_shape(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of a parameter with room in its vocabulary, so that the mesh divides it."""
    over = num_parts(mesh, RULES[VOCAB])
    return tuple(
        -(-size // over) * over if axis == VOCAB else size for size, axis in zip(shape, axes)
    )


def kept_whole(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> int | None:
    """Returns how many key and value heads of a parameter every device holds; None if divided."""
    over = num_parts(mesh, RULES[KV_HEADS])
    heads = [size for size, axis in zip(shape, axes) if axis == KV_HEADS and size % over]
    return heads[0] if heads else None


def check_all_axes_divide(mesh: Mesh, shardings: Iterable[NamedSharding]) -> None:
    """Raises a ValueError if an axis of the mesh divides none of these and no rows of a batch."""
    used = {*BATCH_AXES, PLACES_AXIS}
    for sharding in shardings:
        for axis in sharding.spec:
            used.update(_names(axis))
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise ValueError(
                f"the mesh has {axis}={size}, and nothing in this model is divided by it, so that "
                f"{size} devices would do the same work: leave {axis} at 1"
            )


def automatic_axes() -> dict[str, int]:
    """Returns the axes over which a compiler divides what is traced, name -> number of devices.

    There are none where no mesh is set, and a `jax.shard_map` takes its own away.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def check_places(length: int, **over: int) -> None:
    """Raises a ValueError if a row's places do not divide over the devices that share them.

    Args:
      length: of a row.
      over: axis -> how many devices lie along it.
    """
    devices = math.prod(over.values())
    if length % devices:
        sizes = ", ".join(f"{axis}={size}" for axis, size in over.items())
        raise ValueError(
            f"rows of {length} places do not divide over the mesh's {sizes}: "
            f"choose a length that is a multiple of {devices}, or another mesh"
        )


def lay_places(x_BT: jax.Array, over: Sequence[str] = (PLACES_AXIS,)) -> jax.Array:
    """Lays the rows and places of an activation out, where one of some axes divides places.

    Args:
      x_BT: (B, T, ...).
      over: those axes.
    """
    axes = automatic_axes()
    sizes = {axis: axes[axis] for axis in over if axes.get(axis, 1) > 1}
    if not sizes:
        return x_BT
    check_places(x_BT.shape[1], **sizes)
    return _lay(x_BT, tuple(sizes))


def gather_places(x_BT: jax.Array) -> jax.Array:
    """Gathers the places of an activation that the tensor axis divides, and leaves the others."""
    return x_BT if automatic_axes().get("tensor", 1) == 1 else _lay(x_BT, PLACES_AXIS)


def lay_features(x_BTF: jax.Array) -> jax.Array:
    """Divides the features of an activation over the tensor axis, and its places not."""
    return x_BTF if automatic_axes().get("tensor", 1) == 1 else _lay(x_BTF, PLACES_AXIS, "tensor")


def _lay(x_BT: jax.Array, *dims: MeshAxes) -> jax.Array:
    rows = tuple(axis for axis in BATCH_AXES if axis in automatic_axes())
    return jax.lax.with_sharding_constraint(x_BT, PartitionSpec(rows, *dims))


def num_stages() -> int:
    """Returns over how many stages of the current mesh layers are divided; on one of them it is 1.

    The current mesh is that of `jax.sharding.use_abstract_mesh`, and without one this is 1, too.
    """
    return automatic_axes().get("stage", 1)


def target_platform() -> str:
    """Returns what is compiled for, that of the mesh or of jax: 'cpu', 'tpu', 'gpu' or 'rocm'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind.lower()
    for name in ("cpu", "tpu"):
        if kind.startswith(name):
            return name
    is_amd = "rocm" in jax.extend.backend.get_backend().platform_version.lower()
    return "rocm" if is_amd else jax.default_backend()
