"""What an adapter replaces whole, beside what it adapts: PEFT's `modules_to_save`.

These are heads: a classifier with its pooler, and the head of a language model that is not tied.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.core.paths import flatten, unflatten
from lm.interop.loaded import Loaded
from lm.models import params as P
from lm.models import quantized
from lm.models.foreign import Weight, read_weights, write_weights
from lm.models.tasks import HEAD, for_task, part_of, task_of
from lm.models.zoo import family_of

Tensors = Mapping[str, np.ndarray]
# PEFT's names of what a head is for; it has none for multiple choice.
TASKS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token", "QUESTION_ANS": "span"}
USUAL = ("classifier", "score", "qa_outputs")


def write_head(model: Any, table: Sequence[Weight], flat: Tensors) -> dict[str, np.ndarray]:
    """Returns their tensors of the head of a task, by name; {} where the model has none.

    Args:
      model: a model value.
      table: its weights.
      flat: path -> leaf.
    """
    rows = [row for row in table if part_of(row.paths[0]) in HEAD]
    if task_of(model) is None:
        return {}
    return write_weights(rows, unflatten({path: flat[path] for row in rows for path in row.paths}))


def module_names(names: Tensors) -> list[str] | None:
    """Returns the modules of tensors as `modules_to_save` names them."""
    return sorted({name.rpartition(".")[0] for name in names}) or None


def check_whole(modules: Sequence[str] | None, names: Sequence[str]) -> None:
    """Refuses an adapter that lacks a module which its config says it replaces.

    Args:
      modules: what `modules_to_save` lists.
      names: of the tensors that replace some of the base's.

    Raises:
      ValueError: naming the module.
    """
    for module in modules or ():
        # peft lists its names of classifiers whether the model has them or not.
        if module not in USUAL and not any(f".{module}." in f".{name}" for name in names):
            raise ValueError(
                f"modules_to_save of an adapter names {module!r}, and no tensor of it is one that "
                "may replace the base's head"
            )


def with_head(loaded: Loaded, kind: str | None, tensors: Tensors) -> Loaded:
    """Returns a base with the head that an adapter brings; the base itself where it brings none.

    Leaves of the head that the base lacks are shapes alone.

    Args:
      loaded: the base.
      kind: PEFT's name of a task, or None.
      tensors: of the adapter, by their names in the base.

    Raises:
      ValueError: if the base is for another task, or the adapter of a classifier brings none.
    """
    task = TASKS.get(kind or "")
    there = task_of(loaded.model)
    if task is None or there == task:
        return loaded
    if there is not None:
        raise ValueError(f"the adapter is for the task {task!r}, and its base here for {there!r}")
    model = for_task(loaded.model, task)
    theirs = next(
        row.theirs for row in family_of(model).weights(model) if "classifier/kernel" in row.paths
    )
    if theirs not in tensors:
        raise ValueError(
            f"the adapter is for the task {task!r} and has no {theirs}: open it with a base that "
            "has a classifier"
        )
    if task != "span":
        model = for_task(loaded.model, task, len(tensors[theirs]))
    old = flatten(quantized.dequantize(loaded.model, loaded.params))
    new = {path: old.get(path, shape) for path, shape in flatten(P.abstract(model)).items()}
    return dataclasses.replace(loaded, model=model, params=unflatten(new))


def take_whole(table: Sequence[Weight], flat: Mapping[str, Any], tensors: dict) -> dict[str, Any]:
    """Takes the tensors of heads out of `tensors` and returns path -> leaf.

    Args:
      table: the weights of the model.
      flat: path -> leaf, or its shape.
      tensors: by their names in the base.

    Raises:
      ValueError: if one has another shape.
    """
    rows = [
        row for row in table if part_of(row.paths[0]) in ("head", *HEAD) and row.theirs in tensors
    ]
    found = {row.theirs: tensors.pop(row.theirs) for row in rows}
    shapes = {path: flat[path] for row in rows for path in row.paths}
    return dict(flatten(read_weights(rows, found, unflatten(shapes)))) if rows else {}
