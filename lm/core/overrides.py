"""Typed overrides of any field of a config from the command line: `--train.steps 200`.

A config nests frozen dataclasses and Linen modules, so an override may reach into the model too
(`--model.stack.repeats 6`).
"""

import ast
import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union

from lm.core.config import check_name, fields_of, find_class


def apply_overrides(config: Any, arguments: Sequence[str]) -> Any:
    """Returns the config with `--dotted.field value` (or `--dotted.field=value`) pairs applied.

    Dashes in names stand for underscores, and a field of a field may go by its own name where
    only one has it (`--parallel pmap` for `--train.parallel pmap`). 'none', 'true' and 'false' are
    what they say; a tuple is written '1,2'. A field that holds an object takes the name of another
    class of its module, which keeps what was set in the fields that both have
    (`--optimizer Muon`), or several of its fields at once, the others staying as they are
    (`--mesh fsdp=4,tensor=2`).

    Raises:
      ValueError: naming an unknown field and the nearest right one, a value of another type and
        the type expected, or a field without a value.
    """
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or len(name) < 3:
            raise ValueError(f"expected --field value, but got {name!r}")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            text = rest.pop(0)
        config = set_field(config, whole_path(config, name.replace("-", "_")), text)
    return config


def whole_path(config: Any, path: str) -> str:
    """Returns the path of a field that is named without the field which it belongs to.

    A path that begins at the config, that no field has, or several, is returned as it is.
    """
    name, own = path.partition(".")[0], fields_of(type(config))
    owners = [
        owner
        for owner in own
        if dataclasses.is_dataclass(held := getattr(config, owner))
        and name in fields_of(type(held))
    ]
    return path if name in own or len(owners) != 1 else f"{owners[0]}.{path}"


def set_field(config: Any, path: str, text: str) -> Any:
    """Returns `config` with the field at a dotted path set to what `text` says."""
    name, _, deeper = path.partition(".")
    if isinstance(config, tuple):
        index = parse(name, int, path)
        if index >= len(config):
            raise ValueError(f"there is no item {index} in a tuple of {len(config)}")
        item = set_field(config[index], deeper, text)
        return (*config[:index], item, *config[index + 1 :])
    kind = type(config)
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"{config!r} has no fields, so that {path!r} cannot be set")
    fields = fields_of(kind)
    if name not in fields:
        check_name(path, nearby(config, path), f"field of {kind.__name__}")
    old = getattr(config, name)
    if deeper:
        new = set_field(old, deeper, text)
    elif dataclasses.is_dataclass(old) and text.isidentifier() and text.lower() != "none":
        new = as_class(old, find_class(f"{type(old).__module__}.{text}"))
    elif dataclasses.is_dataclass(old) and "=" in text:
        new = old
        for pair in text.split(","):
            field, _, value = pair.partition("=")
            new = set_field(new, field.strip().replace("-", "_"), value.strip())
    else:
        new = parse(text, typing.get_type_hints(kind)[name], name)
    given = {field: getattr(config, field) for field in fields}
    return kind(**{**given, name: new})


def as_class(old: Any, kind: type) -> Any:
    """Returns a `kind` that keeps what was set in `old`, where it has a field of that name."""
    before = fields_of(type(old))
    kept = {name: getattr(old, name) for name in fields_of(kind) if name in before}
    kept = {name: value for name, value in kept.items() if value != before[name].default}
    try:
        return kind(**kept)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot replace {type(old).__name__}: {error}") from error


def nearby(config: Any, path: str) -> list[str]:
    """Returns the paths that a wrong path may have meant: those that end alike, or else all."""
    paths = [known for known, _ in list_fields(config)]
    wanted = path.rpartition(".")[2]
    ends = difflib.get_close_matches(wanted, [known.rpartition(".")[2] for known in paths])
    return [known for known in paths if known.rpartition(".")[2] in ends] or paths


def parse(text: str, annotation: Any, name: str) -> Any:
    """Returns the value of a type annotation that `text` spells; ValueError if it spells none."""
    for candidate in _spellings(text):
        value = _convert(candidate, annotation)
        if value is not MISFIT:
            return value
    shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    raise ValueError(
        f"--{name.replace('_', '-')} takes {shown.replace('typing.', '')}, not {text!r}"
    )


MISFIT = object()
WORDS = {"none": None, "true": True, "false": False}


def _spellings(text: str) -> list[Any]:
    """Returns what a text may mean, the likeliest first: a word, a literal, the text itself."""
    found = [WORDS[text.lower()]] if text.lower() in WORDS else []
    for source in (text, f"({text},)"):
        with contextlib.suppress(ValueError, SyntaxError):
            found.append(ast.literal_eval(source))
    return [*found, text]


def _convert(value: Any, annotation: Any) -> Any:
    """Returns `value` as a member of the annotation, or MISFIT."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        members = [_convert(value, member) for member in arguments]
        return next((member for member in members if member is not MISFIT), MISFIT)
    if origin is Literal:
        return value if value in arguments else MISFIT
    if annotation is None or annotation is types.NoneType:
        return value if value is None else MISFIT
    if origin is tuple or annotation is tuple:
        if not isinstance(value, tuple):
            return MISFIT
        members = [_convert(item, arguments[0] if arguments else Any) for item in value]
        return MISFIT if any(m is MISFIT for m in members) else tuple(members)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, bool):
        return MISFIT
    return value if isinstance(annotation, type) and isinstance(value, annotation) else MISFIT


def list_fields(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Returns (dotted path, value) of every field that can be set, depth first."""
    if isinstance(config, tuple) and any(dataclasses.is_dataclass(item) for item in config):
        items = [(str(index), item) for index, item in enumerate(config)]
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        items = [(name, getattr(config, name)) for name in fields_of(type(config))]
    else:
        return [(prefix, config)]
    found = []
    for name, value in items:
        found += list_fields(value, f"{prefix}.{name}" if prefix else name)
    return found
