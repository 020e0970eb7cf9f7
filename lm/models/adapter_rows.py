"""Which of a model's adapters each row of a batch uses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.core.paths import flatten
from lm.models.adapters import adapted, beside, several
from lm.models.quantized import leaf_of

Adapters = int | Sequence[int] | None


def num_adapters(params: Mapping[str, Any]) -> tuple[int, bool]:
    """Returns how many adapters a model has, and whether a row chooses among them."""
    flat = flatten(params)
    path = next(iter(adapted(flat)), None)
    if path is None:
        return 0, False
    leaves = beside(flat, path)
    stacked = bool(several(leaves, leaf_of(flat, path)))
    return (leaves["scale"].shape[-1] if stacked else 1), stacked


def choose(params: Mapping[str, Any], adapters: Adapters, rows: int) -> np.ndarray | None:
    """Returns `ctx.adapter_B` for a batch.

    Args:
      params: parameters of a model.
      adapters: number of an adapter, -1 for the base alone: one for all rows, or one per row. None
        where there is one adapter for all, or none.
      rows: how many.

    Returns:
      (rows,) int32, or None where nothing is to be chosen.

    Raises:
      ValueError: if there is no adapter of a number, the numbers are not as many as the rows, or
        there are several adapters and none is chosen.
    """
    count, stacked = num_adapters(params)
    if adapters is None:
        if stacked:
            raise ValueError(
                f"this model has {count} adapters: choose with adapters=, one number or one for "
                f"each row, 0 to {count - 1}, or -1 for the base alone"
            )
        return None
    if not count:
        raise ValueError(
            "this model has no adapter to choose: open it with lm.load(path, adapter=...)"
        )
    ids = np.asarray(adapters)
    if not np.issubdtype(ids.dtype, np.integer) or (ids.ndim and ids.shape != (rows,)):
        raise ValueError(
            f"adapters must be one integer, or {rows}, one for each row, not {adapters}"
        )
    ids_B = np.broadcast_to(ids, rows)
    if (wrong_B := (ids_B < -1) | (ids_B >= count)).any():
        raise ValueError(
            f"there is no adapter {ids_B[wrong_B][0]}: this model has 0 to {count - 1}, and -1 is "
            "the base alone"
        )
    return ids_B.astype(np.int32)
