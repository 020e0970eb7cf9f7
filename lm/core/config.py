"""Values of this package as JSON and back: {"class": "lm.models.decoder.Decoder", fields}.

A config is a tree of frozen dataclasses and Linen modules over numbers, strings, booleans, None
and tuples. Lists and dicts are no part of it: they would break hashing, and so static arguments.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Iterable
from typing import Any

import flax.linen as nn

Json = Any
ABSENT = "absent"


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    """Returns the fields of a dataclass or module that its constructor takes from a user."""
    own = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if issubclass(kind, nn.Module):
        own = {name: field for name, field in own.items() if name not in ("parent", "name")}
    return own


def to_json(value: Any) -> Json:
    """Returns a value as JSON: tuples become lists, dataclasses and modules become objects.

    Raises:
      ValueError: for a value that JSON, or hashing, cannot hold: an array, a function, a dict.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {name: to_json(getattr(value, name)) for name in fields_of(kind)}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **fields}
    raise ValueError(
        f"a config holds numbers, strings, tuples, dataclasses and modules, not {value!r} "
        f"of type {type(value).__name__}"
    )


def from_json(data: Json) -> Any:
    """Inverts `to_json`; a field that is absent has its default.

    Raises:
      ValueError: naming an unknown class or field (and the nearest right name), a field that is
        missing, or a value of another kind.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "class" not in data:
        raise ValueError(f'an object in a config names its "class"; this one has {sorted(data)}')
    kind = find_class(data["class"])
    fields = fields_of(kind)
    given = {name: from_json(item) for name, item in data.items() if name != "class"}
    for name in given:
        check_name(name, fields, f"field of {kind.__qualname__}")
    missing = [name for name, field in fields.items() if name not in given and not _default(field)]
    if missing:
        raise ValueError(f"{kind.__qualname__} needs {', '.join(missing)}, which the config lacks")
    return kind(**given)


def _default(field: dataclasses.Field) -> bool:
    return (
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )


def find_class(path: str) -> type:
    """Returns a dataclass or module of this package by its dotted path; no other is loaded.

    Raises:
      ValueError: for a path outside of `lm.`, or where there is no such class.
    """
    module_name, _, name = str(path).rpartition(".")
    if not module_name.startswith("lm."):
        raise ValueError(f"a config names classes of this package (lm.…), not {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {module_name} (of the class {path!r})") from error
    kinds = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    check_name(name, kinds, f"class of {module_name}")
    return kinds[name]


def check_name(name: str, known: Iterable[str], what: str) -> None:
    """Raises a ValueError for an unknown name, with the nearest right one."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}?" if near else "it has none"
    raise ValueError(f"there is no {what} called {name!r}: {hint}")


def with_defaults(data: Json) -> Json:
    """Returns JSON of `to_json` with the fields that its objects lack at their defaults.

    So a config that was written before a field came is what it was. Objects of classes that are
    not (or no longer) of this package stay as they are.
    """
    if isinstance(data, list):
        return [with_defaults(item) for item in data]
    if not isinstance(data, dict):
        return data
    given = {name: with_defaults(item) for name, item in data.items()}
    try:
        fields = fields_of(find_class(data.get("class", "")))
    except ValueError:
        return given
    absent = [field for name, field in fields.items() if name not in given and _default(field)]
    return given | {field.name: to_json(default_of(field)) for field in absent}


def default_of(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def differences(left: Json, right: Json, path: str = "") -> dict[str, tuple[Json, Json]]:
    """Returns dotted path -> (left, right) wherever two JSON values differ; 'absent' for none."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        pairs = {key: (left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys}
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = {str(index): pair for index, pair in enumerate(zip(left, right))}
    else:
        same = left == right and isinstance(left, bool) == isinstance(right, bool)
        return {} if same else {path: (left, right)}
    found = {}
    for key, (a, b) in pairs.items():
        found.update(differences(a, b, f"{path}.{key}" if path else key))
    return found
