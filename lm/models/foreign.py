"""How a family's weights are written elsewhere: one table, read in both directions.

A family says once, in a list of `Weight` rows, which foreign tensor holds which of our leaves and
in what layout. Importing and exporting are the two directions of that one table, and both are
closed: what nobody maps is an error that names it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.core.paths import flatten, unflatten

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Same:
    """The same array; or the same numbers in another shape, when `shape` gives theirs."""

    shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None

    def read(self, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Arrays:
        return [array.reshape(shapes[0])]

    def write(self, arrays: Arrays) -> np.ndarray:
        (array,) = arrays
        return array if self.shape is None else array.reshape(self.shape(array.shape))


@dataclasses.dataclass(frozen=True)
class Vector:
    """A flat vector: our leaves, flattened and joined."""

    def read(self, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Arrays:
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(array, ends), shapes)]

    def write(self, arrays: Arrays) -> np.ndarray:
        return np.concatenate([array.reshape(-1) for array in arrays])


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix: our kernels (in..., out...), flattened to two dimensions and joined by output.

    Attributes:
      num_in: how many of the first dimensions of our kernel are inputs.
      transposed: theirs is (out, in), as torch's `Linear`; otherwise (in, out), as GPT-2's.
    """

    num_in: int = 1
    transposed: bool = True

    def read(self, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Arrays:
        matrix = array.T if self.transposed else array
        ends = np.cumsum([math.prod(shape[self.num_in :]) for shape in shapes])[:-1]
        parts = np.split(matrix, ends, axis=1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes)]

    def write(self, arrays: Arrays) -> np.ndarray:
        rows = [array.reshape(math.prod(array.shape[: self.num_in]), -1) for array in arrays]
        matrix = np.concatenate(rows, axis=1)
        return matrix.T if self.transposed else matrix


@dataclasses.dataclass(frozen=True)
class Weight:
    """One foreign tensor, or one per layer.

    Attributes:
      ours: path of our leaf, or of several that theirs holds together.
      theirs: name of their tensor; '{}' stands for the number of the layer, which is then the
        first dimension of our leaves.
      layout: how the numbers lie.
      stride, offset: layer number of repeat r is `r * stride + offset` (patterns of several
        blocks).
    """

    ours: str | tuple[str, ...]
    theirs: str
    layout: Any = Same()
    stride: int = 1
    offset: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def names(self, repeats: int) -> list[str]:
        return [self.theirs.format(r * self.stride + self.offset) for r in range(repeats)]


def in_layers(
    rows: Sequence[Weight], ours: str, theirs: str, *, stride: int = 1, offset: int = 0
) -> list[Weight]:
    """Prefixes rows of one block: paths with `ours`, names with `theirs`, which holds the '{}'."""
    return [
        Weight(
            tuple(ours + path for path in row.paths),
            theirs + row.theirs,
            row.layout,
            stride,
            offset,
        )
        for row in rows
    ]


def projection(ours: str, theirs: str, *, num_in: int = 1, bias: bool = True) -> list[Weight]:
    """Rows of a `Projection` that is a torch `Linear` there."""
    rows = [Weight(f"{ours}/kernel", f"{theirs}.weight", Linear(num_in))]
    return [*rows, Weight(f"{ours}/bias", f"{theirs}.bias", Vector())] if bias else rows


def attention(ours: str, theirs: Sequence[str], *, bias: bool = True) -> list[Weight]:
    """Rows of an `Attention`; `theirs` names what projects q, k, v and out."""
    names = zip(("q", "k", "v", "out"), theirs, (1, 1, 1, 2))
    rows = [projection(f"{ours}/{p}", name, num_in=n, bias=bias) for p, name, n in names]
    return [row for group in rows for row in group]


def layer_norm(ours: str, theirs: str) -> list[Weight]:
    """Rows of a `LayerNorm`."""
    return [
        Weight(f"{ours}/scale", f"{theirs}.weight"),
        Weight(f"{ours}/bias", f"{theirs}.bias"),
    ]


def read_weights(
    table: Sequence[Weight],
    tensors: Mapping[str, np.ndarray],
    abstract: Mapping,
    ignore: Sequence[str] = (),
) -> dict:
    """Returns our parameters, as fp32 numpy arrays, from foreign tensors.

    Args:
      table: the family's weights.
      tensors: foreign name -> array.
      abstract: our parameters' shapes, as `lm.models.params.abstract` gives them.
      ignore: regular expressions of foreign names that carry no weights of ours (buffers).

    Raises:
      ValueError: naming every tensor that nobody maps, is missing, or has another size.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    left = {name for name in tensors if not any(re.fullmatch(p, name) for p in ignore)}
    params: dict[str, np.ndarray] = {}
    missing = []

    def fetch(name: str, row: Weight, row_shapes) -> Arrays:
        left.discard(name)
        array = np.asarray(tensors[name]).astype(np.float32)
        size = sum(math.prod(shape) for shape in row_shapes)
        if array.size != size:
            raise ValueError(
                f"tensor {name} has shape {array.shape}, but {' + '.join(row.paths)} takes "
                f"{' + '.join(str(shape) for shape in row_shapes)}: the config is of another model"
            )
        return row.layout.read(array, row_shapes)

    for row in table:
        row_shapes = [shapes[path] for path in row.paths]
        stacked = "{}" in row.theirs
        names = row.names(row_shapes[0][0]) if stacked else [row.theirs]
        absent = [name for name in names if name not in tensors]
        if absent:
            missing += absent
            continue
        if stacked:
            layers = [fetch(name, row, [shape[1:] for shape in row_shapes]) for name in names]
            parts = [np.stack(column) for column in zip(*layers)]
        else:
            parts = fetch(names[0], row, row_shapes)
        params.update(zip(row.paths, parts))
    if missing:
        raise ValueError(f"tensors are missing: {_some(missing)}")
    if left:
        raise ValueError(f"tensors that nothing maps: {_some(sorted(left))}")
    unset = sorted(shapes.keys() - params.keys())
    assert not unset, f"the table sets no {_some(unset)}"
    return unflatten(params)


def write_weights(
    table: Sequence[Weight], params: Mapping, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Returns foreign name -> contiguous array of a dtype; the inverse of `read_weights`."""
    flat = {path: np.asarray(leaf, dtype) for path, leaf in flatten(params).items()}
    tensors = {}
    for row in table:
        arrays = [flat.pop(path) for path in row.paths]
        if "{}" in row.theirs:
            for r, name in enumerate(row.names(len(arrays[0]))):
                tensors[name] = row.layout.write([array[r] for array in arrays])
        else:
            tensors[row.theirs] = row.layout.write(arrays)
    assert not flat, f"the table writes no {_some(sorted(flat))}"
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
