"""The base class of every module: a value that owns its parts."""

import dataclasses
from typing import Any

import flax.linen as nn


def _owned(value: Any) -> Any:
    """Returns a fresh copy of each unbound module in `value`, a module or a nest of tuples."""
    if isinstance(value, nn.Module):
        return value.clone(parent=None) if value.scope is None else value
    if isinstance(value, tuple):
        return tuple(_owned(item) for item in value)
    return value


class Part(nn.Module):
    """A Flax Linen module that copies the modules it is given.

    Linen shares the parameters of one module value that is used in two places, silently, and the
    shared and the unshared model compare and hash equal. Here each place in a composition owns
    its parameters, so `Block(norm, norm)` and `Stack((block, block), 12)` mean what they say.
    Sharing on purpose is a part of its own.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("parent", "name"):
                value = getattr(self, field.name, None)
                if isinstance(value, nn.Module | tuple):
                    object.__setattr__(self, field.name, _owned(value))
        super().__post_init__()
