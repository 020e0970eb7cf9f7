"""The step of an experiment compiled for chips that are not there, by TPU's own compiler.

It needs the package libtpu, and no TPU.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax

from lm.core.mesh import batch_sharding, make_mesh, num_batch_shards
from lm.ops.attention import choices
from lm.train.experiment import Experiment
from lm.train.plan import Cost, Plan, attention_line, make_plan, offload_line
from lm.train.run import check_tokenizer, open_data
from lm.train.state import abstract_state, for_devices, state_shardings
from lm.train.step import check_batch_size, jit_step

NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def plan_ahead(experiment: Experiment, topology: str, tokenizer: Any = None) -> Plan:
    """Returns the plan of an experiment on a TPU topology; it trains nothing.

    Args:
      experiment: whose mesh is to fit the topology's chips. Its data is read for the shape of one
        batch.
      topology: kind and shape of a slice, such as 'v5e:2x2'.
      tokenizer: of the start, as of `lm.train.loop.train`.

    Raises:
      ValueError: if libtpu is missing or does not know the topology; if the mesh or the batch does
        not divide over its chips; if the compiler finds no room for the step.
    """
    devices = topology_devices(topology)
    config, recipe = experiment.train, for_devices(experiment.recipe(), devices)
    mesh = make_mesh(experiment.mesh, devices)
    check_batch_size(config.batch_size, recipe.micro_batches, num_batch_shards(mesh))
    data = open_data(experiment.data, Path(), tokenizer)
    check_tokenizer(data.tokenizer, experiment.model.vocab_size)
    first = next(data.train(config.batch_size, config.seed, 0))
    shapes = abstract_state(recipe)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(recipe, mesh, shapes),
    )
    rows = batch_sharding(mesh)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), first
    )
    with choices() as attention:
        lowered = jit_step(recipe, mesh, shapes).lower(state, batch)
    try:
        cost = Cost.of(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the step does not compile for {topology}: {reason}") from error
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    flat = first.tokens.reshape(-1, first.tokens.shape[-1])
    lines = {
        "devices": f"{len(devices)} x {devices[0].device_kind}, compiled ahead of time"
        + (f", mesh: {sizes}" if sizes else ""),
        "batch": f"{len(flat)} rows of {flat.shape[1]} in {recipe.micro_batches} parts, "
        f"{config.dtype}",
        "attention": attention_line(attention),
        "remat": config.remat,
        **offload_line(recipe, recipe, shapes),
    }
    return make_plan(recipe, shapes, flat.shape, cost, lines, devices)


def topology_devices(topology: str) -> list[Any]:
    """Returns the chips of a TPU topology, to compile for; errors as of `plan_ahead`."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("a TPU's plan needs the package libtpu: pip install 'lm[plan]'")
    from jax.experimental import topologies

    # It would ask the machine's metadata server which TPU it has, for minutes, and then complain.
    for name, value in NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # noqa: BLE001: libtpu raises whatever it likes.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{topology!r} is no TPU topology ({reason}): name a slice such as v5e:2x2"
        ) from error
