"""The step of an experiment compiled for chips that are not there, by TPU's own compiler.

It needs the package libtpu, and no TPU.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lm.core.batch import Batch
from lm.core.mesh import make_mesh, num_batch_shards
from lm.ops.attention import choices
from lm.train.experiment import Experiment
from lm.train.plan import (
    Cost,
    DoesNotFit,
    Plan,
    attention_line,
    layout_lines,
    make_plan,
    offload_line,
    places_of,
)
from lm.train.run import check_tokenizer, open_data
from lm.train.state import abstract_state, for_devices, state_shardings
from lm.train.step import batch_shardings, check_batch_size, check_lengths, jit_step

NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # One process at a time may hold a TPU; compilers do not mind each other.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# How libtpu says that a step is too large, and the two numbers of it.
SIZE = r"([\d.]+[KMGT]?)"
TOO_LARGE = re.compile(
    rf"Used {SIZE} of {SIZE} hbm|required for .*?\({SIZE}\) exceeds available HBM \({SIZE}\)"
)


def plan_ahead(experiment: Experiment, topology: str, tokenizer: Any = None) -> Plan:
    """Returns the plan of an experiment on a TPU topology; it trains nothing.

    Args:
      experiment: whose mesh is to fit the topology's chips. Its data is read for the shape of one
        batch.
      topology: kind and shape of a slice, such as 'v5e:2x2'.
      tokenizer: of the start, as of `lm.train.loop.train`.

    Raises:
      DoesNotFit: if the compiler finds no room for the step, with what it would take.
      ValueError: if libtpu is missing or does not know the topology; if the mesh or the batch does
        not divide over its chips; if the step does not compile.
    """
    devices = topology_devices(topology)
    return plan_step(devices, experiment, batch_shapes(experiment, tokenizer))


def batch_shapes(experiment: Experiment, tokenizer: Any = None) -> Batch:
    """Returns the shapes of a global batch, of the first that the data give; errors as there."""
    config = experiment.train
    data = open_data(experiment.data, Path(), tokenizer)
    check_tokenizer(data.tokenizer, experiment.model.vocab_size)
    first = next(data.train(config.batch_size, config.seed, 0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), first)


def plan_step(devices: Sequence[Any], experiment: Experiment, batch: Batch) -> Plan:
    """Returns the plan of a step compiled for devices, which need not be there.

    Args:
      devices: as of `topology_devices`.
      experiment: whose mesh is to fit them.
      batch: the shapes of a global batch.

    Raises:
      DoesNotFit, ValueError: as of `plan_ahead`.
    """
    config, recipe = experiment.train, for_devices(experiment.recipe(), devices)
    mesh = make_mesh(experiment.mesh, devices)
    check_batch_size(config.batch_size, recipe.micro_batches, num_batch_shards(mesh))
    shapes = abstract_state(recipe, mesh)
    state = jax.tree.map(placed, shapes, state_shardings(recipe, mesh, shapes))
    check_lengths(batch, mesh)
    laid_out = jax.tree.map(placed, batch, batch_shardings(mesh, batch))
    with choices() as attention:
        lowered = jit_step(recipe, mesh, shapes).lower(state, laid_out)
    try:
        with uncached():
            cost = Cost.of(lowered.compile(), with_collectives=True)
    except jax.errors.JaxRuntimeError as error:
        raise too_large_or(error, len(devices), devices[0].device_kind) from error
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    shape = places_of(batch)
    lines = {
        "devices": f"{len(devices)} x {devices[0].device_kind}, compiled ahead of time"
        + (f", mesh: {sizes}" if sizes else ""),
        "batch": f"{shape[0]} rows of {shape[1]} in {recipe.micro_batches} parts, {config.dtype}",
        "attention": attention_line(attention),
        "remat": config.remat,
        **layout_lines(recipe, mesh, shapes),
        **offload_line(recipe, recipe, shapes),
    }
    return make_plan(recipe, shapes, shape, cost, lines, devices)


@contextmanager
def uncached() -> Iterator[None]:
    """Without jax's cache on disk: a program for chips that are not there is never loaded again."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # Else what it was is remembered.
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def too_large_or(error: Exception, count: int, kind: str) -> ValueError:
    """Returns what a compiler's error means: that the step is too large, or else its first line."""
    if found := TOO_LARGE.search(str(error)):
        used, there = filter(None, found.groups())
        return DoesNotFit(
            f"the step needs {used} of a chip's {there}, on {count} x {kind}: choose a smaller "
            "batch, more micro-batches, another remat (full takes least) or more chips"
        )
    reason = str(error).strip().splitlines()[0]
    return ValueError(f"the step does not compile for {count} x {kind}: {reason}")


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
    except Exception as error:  # noqa: BLE001 - libtpu raises whatever it likes.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{topology!r} is no TPU topology ({reason}): name a slice such as v5e:2x2"
        ) from error
