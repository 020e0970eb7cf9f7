"""Paths into pytrees of nested dicts: 'stack/pattern_0/mixer/layer/q/kernel'."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

Tree = Any


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns {path: leaf} for a nested dict, keys joined by '/', in sorted order of paths."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Inverts `flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def matches(path: str, pattern: str) -> bool:
    """Whether a path fits a glob pattern; `*` crosses '/', so '*/q/kernel' finds every q."""
    return fnmatch.fnmatchcase(path, pattern)


def map_with_path(function: Callable[..., Any], tree: Mapping, *rest: Mapping) -> dict:
    """Applies `function(path, leaf, *other leaves)` to every leaf of nested dicts."""
    flats = [flatten(other) for other in rest]
    return unflatten(
        {
            path: function(path, leaf, *(f[path] for f in flats))
            for path, leaf in flatten(tree).items()
        }
    )


def partition(tree: Mapping, keep: Callable[[str], bool]) -> tuple[dict, dict]:
    """Splits a nested dict in two by path: the leaves where `keep(path)` holds, and the others."""
    flat = flatten(tree)
    kept = {path: leaf for path, leaf in flat.items() if keep(path)}
    return unflatten(kept), unflatten(
        {path: leaf for path, leaf in flat.items() if path not in kept}
    )


def merge(left: Mapping, right: Mapping) -> dict:
    """Joins two nested dicts that share no path, as `partition` made them."""
    flat_left, flat_right = flatten(left), flatten(right)
    both = flat_left.keys() & flat_right.keys()
    assert not both, f"paths in both trees: {sorted(both)[:3]}"
    return unflatten({**flat_left, **flat_right})


def shape_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Returns a sentence that names the first leaves that only one tree has or that differ, or ''.

    Args:
      there, here: nested dicts of arrays, or of anything with a shape.
    """
    old = {path: tuple(leaf.shape) for path, leaf in flatten(there).items()}
    new = {path: tuple(leaf.shape) for path, leaf in flatten(here).items()}
    wrong = [
        f"{path} is {old.get(path, 'absent')} there and {new.get(path, 'absent')} here"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more
