"""What trains is a table: ordered groups of parameters by path; the first that fits decides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import optax

from lm.core.paths import flatten, matches
from lm.models import params as P
from lm.models.quantized import kernel_path
from lm.models.tasks import task_of
from lm.train.offload import streamed
from lm.train.optimizer import Axes, Optimizer, Rate, by_path
from lm.train.schedule import Schedule


@dataclass(frozen=True)
class Group:
    """One row of the table of what trains, and how.

    A leaf that does not train gets no gradient, no optimizer state, no decay and no clipping.

    Attributes:
      pattern: glob over paths; '*' crosses '/', so '*/q/kernel' is every query kernel.
      trains: whether these parameters change at all.
      optimizer: of this group, or None for that of the experiment.
      learning_rate: multiplies the learning rate of the optimizer.
      weight_decay: multiplies its weight decay.
    """

    pattern: str
    trains: bool = True
    optimizer: Optimizer | None = None
    learning_rate: float = 1.0
    weight_decay: float = 1.0


Table = tuple[Group, ...]

FULL: Table = (Group("*"),)


def beside_adapter(*patterns: str) -> Table:
    """Returns the table that trains an adapter (`lm.models.adapters`) and what fits the patterns.

    The scale of an adapter is a constant.
    """
    rest = (Group("*/lora_scale", trains=False), *map(Group, patterns)) if patterns else ()
    return (Group("*/lora_[abm]"), *rest, Group("*", trains=False))


ADAPTER: Table = beside_adapter()


def table_of(trainable: Table | None, model: nn.Module, adapter: Any) -> Table:
    """Returns the table; where there is none, all trains, or the adapter and the head of a task."""
    if trainable or adapter is None:
        return trainable or FULL
    parts = P.abstract(model) if task_of(model) else {}
    return beside_adapter(*(f"{name}/*" for name in ("pooler", "classifier") if name in parts))


def assign(table: Table, params: Mapping[str, Any]) -> dict[str, int]:
    """Returns path -> number of the group that it belongs to.

    The codes and scales of a quantized kernel belong to the group of the kernel.

    Args:
      table: the groups, in order.
      params: nested dict of anything.

    Raises:
      ValueError: if a leaf fits no group, a group gets no leaf, or nothing trains.
    """
    found = {}
    for path in flatten(params):
        for index, group in enumerate(table):
            if matches(kernel_path(path), group.pattern):
                found[path] = index
                break
        else:
            raise ValueError(
                f"no group of the trainable table fits the parameter {path}: end the table with "
                'Group("*", trains=False) or Group("*")'
            )
    for index, group in enumerate(table):
        if index not in found.values():
            raise ValueError(
                f"the group {group.pattern!r} of the trainable table has no parameter: none fits, "
                "or groups before it take them all"
            )
    if not any(table[index].trains for index in found.values()):
        raise ValueError("nothing trains: every group of the trainable table has trains=False")
    return found


def trained_paths(table: Table, params: Mapping[str, Any]) -> frozenset[str]:
    """Returns the paths of the parameters that train; errors as of `assign`."""
    return frozenset(path for path, index in assign(table, params).items() if table[index].trains)


def make_transform(
    optimizer: Optimizer,
    table: Table,
    params: Mapping[str, Any],
    axes: Axes,
    offload: bool = False,
) -> optax.GradientTransformation:
    """Returns the optax transformation of the trained parameters alone.

    Args:
      optimizer: of the groups that have none of their own; its `clip_norm` holds for all.
      table: the groups.
      params: all parameters (only the paths matter); errors as of `assign`.
      axes: path -> logical axes of the model's parameters.
      offload: whether its state lies in the host's memory between updates.
    """
    groups = assign(table, params)
    transforms = {}
    for index, group in enumerate(table):
        if group.trains:
            own = group.optimizer or optimizer
            transforms[str(index)] = own.transform(
                scaled(own.learning_rate, group.learning_rate),
                own.weight_decay * group.weight_decay,
                axes,
            )
    partitioned = optax.partition(
        transforms, lambda trained: by_path(lambda path: str(groups[path]), trained)
    )
    if offload:
        partitioned = streamed(partitioned)
    if optimizer.clip_norm is None:
        return partitioned
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), partitioned)


def scaled(schedule: Schedule, factor: float) -> Rate:
    """Returns a schedule times a factor."""
    return lambda step: factor * schedule(step)
