"""What a step takes by arithmetic alone, on devices that no compiler here knows."""

import math
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from lm.core.batch import Batch
from lm.core.mesh import MeshShape, num_batch_shards
from lm.core.paths import flatten
from lm.models.kernels import kernels
from lm.ops.attention import FLASH_LENGTH
from lm.ops.loss import default_chunk_bytes
from lm.train.chips import DEVICES, measure_host
from lm.train.experiment import Experiment
from lm.train.plan import (
    Cost,
    Plan,
    bytes_here,
    layout_lines,
    make_plan,
    model_flops,
    num_bytes,
    places_of,
    size,
)
from lm.train.state import Recipe, TrainState, abstract_state, axes_of, state_shardings
from lm.train.step import check_batch_size

# Logical axes of activations that the tensor axis divides.
DIVIDED = ("heads", "kv_heads", "mlp")


def plan_device(device: str, experiment: Experiment, batch: Batch) -> Plan:
    """Returns the plan of an experiment on devices of one kind, without compiling anything.

    Args:
      device: a name in `lm.train.chips.DEVICES`, or 'cpu' for this machine.
      experiment: its mesh says how many devices there are; an axis of -1 is 1.
      batch: the shapes of a global batch.

    Raises:
      ValueError: for another device, or if a parameter or the batch does not divide over the mesh.
    """
    if device != "cpu" and device not in DEVICES:
        raise ValueError(f"--device is one of cpu, {', '.join(DEVICES)}, not {device!r}")
    mesh = abstract_mesh(experiment.mesh)
    config, recipe = experiment.train, experiment.recipe()
    check_batch_size(config.batch_size, recipe.micro_batches, num_batch_shards(mesh))
    shapes = abstract_state(recipe, mesh)
    chunk_bytes = default_chunk_bytes(device)
    cost = estimate(recipe, mesh, shapes, batch, chunk_bytes)
    if device == "cpu":
        devices = jax.devices("cpu")[:1] * mesh.size
    else:
        devices = [SimpleNamespace(device_kind=DEVICES[device], platform="")] * mesh.size
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    rows, length = places_of(batch)
    lines = {
        "devices": f"{mesh.size} x {device}, by the analytic model, not compiled"
        + (f", mesh: {sizes}; what they send each other is not counted" if sizes else ""),
        "batch": f"{rows} rows of {length} in {recipe.micro_batches} parts, {config.dtype}",
        "remat": config.remat,
    }
    lines |= layout_lines(recipe, mesh, shapes)
    plan = make_plan(recipe, shapes, (rows, length), cost, lines, devices)
    return replace(plan, chip=measure_host(plan.peak_flops)) if device == "cpu" else plan


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """Returns a mesh of no devices in particular, with 1 along an axis that is left open."""
    sizes = {field.name: max(1, getattr(shape, field.name)) for field in fields(shape)}
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def estimate(recipe: Recipe, mesh: Any, state: TrainState, batch: Batch, chunk_bytes: int) -> Cost:
    """Returns the memory that a step takes on each device of a mesh.

    Arguments are parameters, optimizer state and batch as they are laid out. Temporaries are fp32
    gradients, twice where micro-batches are added up, and what `activation_bytes` says.
    """
    shardings = state_shardings(recipe, mesh, state)
    trained, _ = recipe.split(state.params)
    trained_here, _ = recipe.split(shardings.params)
    shards = num_batch_shards(mesh)
    held = bytes_here(state, shardings)
    gradients = bytes_here(trained, trained_here) * (2 if recipe.micro_batches > 1 else 1)
    rows, length = places_of(batch)
    own = rows // recipe.micro_batches
    here = Tokens(own // shards, length, own, chunk_bytes)
    return Cost(
        temporary_bytes=round(gradients + activation_bytes(recipe, mesh, state.params, here)),
        argument_bytes=held + num_bytes(batch) // shards,
        output_bytes=held,
    )


@dataclass(frozen=True)
class Tokens:
    """The places that a device computes at a time.

    Attributes:
      rows: of a micro-batch on one device.
      length: of a row.
      all_rows: of a micro-batch on all devices.
      chunk_bytes: of fp32 logits that it holds at a time.
    """

    rows: int
    length: int
    all_rows: int
    chunk_bytes: int


@dataclass(frozen=True)
class Widths:
    """Features of one place, summed over all repeats of the stack, as one device holds them.

    Attributes:
      stream: D of each repeat, its input.
      outputs: of all projections.
      inputs: of all projections, one that several share counted once.
      norms: what is normalised.
      heads: of queries.
      repeats: of the stack.
    """

    stream: int
    outputs: int
    inputs: int
    norms: int
    heads: int
    repeats: int


def activation_bytes(recipe: Recipe, mesh: Any, params: Any, here: Tokens) -> float:
    """Returns what one device holds of activations when the backward pass begins.

    For each place, with a bytes a number in the compute dtype, and sums over the stack:

        full, offload    a stream
        dots             a (stream + outputs)
        none             a (stream + outputs + inputs) + n norms + 4 heads

    since 'none' keeps what a product differentiates, activation functions keep no more
    (`lm.ops.activation`), norms keep their input and what it is normalised to in fp32 (n = 8; in an
    fp32 model the input is there already, n = 4), and attention in blocks keeps the sum of each
    row; attention that holds all scores (shorter rows, or by name) keeps (4 + a) heads length more.
    To this come, for every policy but 'none', what one repeat keeps by 'none' while its gradient is
    taken; the hidden states with their gradients; and the logits of as many places as the loss
    takes at a time, three times in fp32. A recurrence's states are not counted.

    Args:
      recipe: the run's.
      mesh: with the sizes of its axes.
      params: of the model, arrays or shapes.
      here: what is computed at a time.
    """
    widths, a = widths_of(recipe, mesh, params), 2 if recipe.dtype == "bfloat16" else 4
    everything = a * (widths.stream + widths.outputs + widths.inputs)
    everything += (8 if a == 2 else 4) * widths.norms + 4 * widths.heads
    if recipe.attention == "reference" or here.length < FLASH_LENGTH:
        everything += (4 + a) * widths.heads * here.length
    kept = {
        "none": everything,
        "dots": a * (widths.stream + widths.outputs) + everything / widths.repeats,
    }.get(recipe.remat, a * widths.stream + everything / widths.repeats)
    features = widths.stream // widths.repeats
    places = here.rows * here.length
    vocabulary = recipe.model.vocab_size
    at_once = max(1, here.chunk_bytes * mesh.size // (4 * here.all_rows * vocabulary))
    logits = here.rows * min(at_once, here.length) * vocabulary / mesh.shape["tensor"]
    return places * (kept + 4 * a * features) + 3 * 4 * logits


def widths_of(recipe: Recipe, mesh: Any, params: Any) -> Widths:
    """Returns the features of a place that a model's parameters imply."""
    leaves, axes = flatten(params), axes_of(recipe.model)
    repeats, outputs, heads, inputs = 1, 0, 0, {}
    for path, (lead, num_in, _) in kernels(recipe.model).items():
        if "/pattern/" not in path:
            continue
        parent, name = path.rsplit("/", 2)[:2]
        shape, names = leaves_shape(leaves, path), axes[path]
        layers = math.prod(shape[:lead])
        here = [
            n // (mesh.shape["tensor"] if axis in DIVIDED else 1) for n, axis in zip(shape, names)
        ]
        repeats = max(repeats, layers)
        out = layers * math.prod(here[lead + num_in :])
        outputs += out
        inputs[parent, names[lead : lead + num_in]] = layers * math.prod(here[lead : lead + num_in])
        heads += layers * here[lead + num_in] if name == "q" else 0
    norms = {path: leaf for path, leaf in leaves.items() if is_norm(path)}
    features = recipe.model.embed.features
    return Widths(
        stream=repeats * features,
        outputs=outputs,
        inputs=sum(inputs.values()),
        norms=size(norms),
        heads=heads,
        repeats=repeats,
    )


def is_norm(path: str) -> bool:
    return "/pattern/" in path and path.endswith("norm/scale")


def leaves_shape(leaves: Any, path: str) -> tuple[int, ...]:
    """Returns the shape of a kernel, quantized or not."""
    if path in leaves:
        return leaves[path].shape
    return next(leaf.shape for other, leaf in leaves.items() if other.startswith(path + "_"))


def stage_flops(params: Any, length: int, stages: int, divided: bool = True) -> list[float]:
    """Returns the floating point operations of a token, forwards and backwards, on each stage.

    Every stage has as many layers, and of the head a share of ceil(V / stages) tokens; or else the
    last stage has all of it, as without `lm.core.mesh.RULES`. Looking tokens up counts nothing.

    Args:
      params: nested dict of arrays or shapes, all of which train.
      length: T.
      stages: p.
      divided: whether the vocabulary is divided over the stages.
    """
    leaves = flatten(params)
    tied = "head/kernel" not in leaves
    vocab_size, features = (
        leaves["embed/table"].shape if tied else leaves["head/kernel"].shape[::-1]
    )
    head = 6 * features
    layers = model_flops(params, {}, 1, length) / length - head * vocab_size
    share = -(-vocab_size // stages)
    first = stages - 1
    own = [share] * first + [vocab_size - first * share] if divided else [0] * first + [vocab_size]
    return [layers / stages + head * tokens for tokens in own]
