"""From the rows that each process makes to the devices that hold them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.core.batch import Batch
from lm.core.mesh import batch_sharding
from lm.train.step import batch_shardings


def feed(batch: Batch, mesh: Mesh) -> Batch:
    """Returns the global batch on the devices of a mesh; all processes have to call it.

    Where the axes of the batch follow the processes, no row leaves its process. Otherwise, as where
    the devices of one row belong to several processes, the devices exchange what they need.

    Args:
      batch: (B / num_processes, ...) on the host, rows [p B / n, (p + 1) B / n) of process p.
      mesh: all devices of the job.
    """
    count = len({device.process_index for device in mesh.devices.flat})
    rows = jax.tree.leaves(batch)[0].shape[0] * count
    if keeps_rows(mesh, rows):
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_process_local_data(
                sharding, np.asarray(x), (rows, *np.shape(x)[1:])
            ),
            batch,
            batch_shardings(mesh, batch),
        )
    # Each device gets all rows of its process, of which one device of each is then taken.
    line = Mesh(mesh.devices.reshape(-1), ("device",))
    sharding = NamedSharding(line, PartitionSpec("device"))
    held = jax.tree.map(
        lambda x: jax.make_array_from_callback(
            (line.size, *np.shape(x)), sharding, lambda _: np.asarray(x)[None]
        ),
        batch,
    )
    return spread(mesh, jax.tree.structure(batch))(held)


@cache
def keeps_rows(mesh: Mesh, rows: int) -> bool:
    """Whether every device of a mesh holds only rows that its own process makes."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    share = rows // len(processes)
    for device, (span,) in batch_sharding(mesh).devices_indices_map((rows,)).items():
        first, end, _ = span.indices(rows)
        start = processes.index(device.process_index) * share
        if first < start or end > start + share:
            return False
    return True


@cache
def spread(mesh: Mesh, structure: Any) -> Callable[[Batch], Batch]:
    """Returns a function of (devices, B / n, ...) arrays that makes the (B, ...) of a mesh.

    Args:
      mesh: all devices of the job.
      structure: of a batch, which says the fields that it has.
    """
    has = jax.tree.unflatten(structure, range(structure.num_leaves))
    owners = [device.process_index for device in mesh.devices.flat]
    firsts = np.array([owners.index(process) for process in sorted(set(owners))])

    def take(held: Batch) -> Batch:
        return jax.tree.map(lambda x: x[firsts].reshape(-1, *x.shape[2:]), held)

    return jax.jit(take, out_shardings=batch_shardings(mesh, has))
