"""The device mesh, and which of its axes each logical axis of an array lies on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.extend.backend
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis of a parameter's dimension -> mesh axis or axes; what is not named is on every
# device. With the vocabulary on all stages none has more to compute than the others (Yeung et al.,
# 2024).
RULES = {
    "layers": "stage",
    "embed": "fsdp",
    "vocab": ("stage", "tensor"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}
BATCH_AXES = ("data", "fsdp")


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


def num_batch_shards(mesh: Mesh) -> int:
    """Returns over how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def param_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], path: str
) -> NamedSharding:
    """Returns the sharding of a parameter by its logical axes.

    Raises:
      ValueError: if a dimension does not divide over its mesh axis.
    """
    spec = [RULES.get(axis or "") for axis in axes]
    for size, on, name in zip(shape, spec, axes):
        split = {axis: mesh.shape[axis] for axis in (on if isinstance(on, tuple) else [on]) if axis}
        if size % math.prod(split.values()):
            sizes = ", ".join(f"{axis}={number}" for axis, number in split.items() if number > 1)
            raise ValueError(
                f"{path} has {size} along {name!r}, which {sizes} devices do not divide: choose "
                "another mesh or another size"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def num_stages() -> int:
    """Returns over how many stages of the current mesh layers are divided; on one of them it is 1.

    The current mesh is that of `jax.sharding.use_abstract_mesh`, and without one this is 1, too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    return mesh.shape["stage"] if kinds.get("stage") == AxisType.Auto else 1


def target_platform() -> str:
    """Returns what is compiled for, that of the mesh or of jax: 'cpu', 'tpu', 'gpu' or 'rocm'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind.lower()
    for name in ("cpu", "tpu"):
        if kind.startswith(name):
            return name
    is_amd = "rocm" in jax.extend.backend.get_backend().platform_version.lower()
    return "rocm" if is_amd else jax.default_backend()
