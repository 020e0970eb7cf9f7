"""`lm list`, `lm import`, `lm export`: models, at rest."""

import dataclasses
import sys
from typing import Any

from tyro.conf import Positional

from lm.core.config import fields_of
from lm.models import params as P
from lm.models.zoo import all_families, get_family
from lm.opening import export_model as write_directory
from lm.opening import import_model as write_run


def import_model(source: Positional[str], run: Positional[str]) -> None:
    """Writes a pretrained model as a run directory, which the other commands open.

    Args:
      source: a Hugging Face directory, a .gguf file, package:NAME, a hub id, or another run.
      run: the directory to write; it must not exist.
    """
    print(
        f"everything is in {write_run(source, run, print)}; next: lm generate {run} --prompt '...'"
    )


def export_model(model: Positional[str], directory: Positional[str]) -> None:
    """Writes a model as a Hugging Face directory, which `from_pretrained` opens.

    Args:
      model: a run directory, a .gguf file, package:NAME, or another that `lm.load` opens.
      directory: what to write; it must not exist.
    """
    print(f"everything is in {write_directory(model, directory, print)}")


def list_models(name: Positional[str] = "", preset: str = "") -> None:
    """Prints every family with its presets and parameter counts, or draws one.

    Args:
      name: a family to draw; '' lists all.
      preset: which of its sizes to draw; '' is the first.
    """
    if not name:
        for family in all_families().values():
            rows = ", ".join(family.ledger)
            about = (sys.modules[family.build.__module__].__doc__ or "").splitlines()[0]
            print(f"{family.name:<10} {about}")
            for key in family.presets:
                print(f"  {key:<12} {P.count(family.preset(key)):>18,} parameters")
            print(f"  {'ledger':<12} {rows}")
        return
    family = get_family(name)
    preset = preset or next(iter(family.presets))
    model = family.preset(preset)
    print(f"{name} {preset}: {P.count(model):,} parameters")
    print(draw(model))
    for cell, reason in family.inapplicable.items():
        print(f"not tested for {cell!r}: {reason}")


def draw(value: Any, indent: int = 0) -> str:
    """Returns a composition as an indented outline: one part a line, with its own numbers."""
    pad = "  " * indent
    own, parts = [], []
    for name, field in fields_of(type(value)).items():
        item = getattr(value, name)
        if dataclasses.is_dataclass(item) and hasattr(item, "apply"):
            parts.append((name, item))
        elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            parts += [(f"{name}[{i}]", part) for i, part in enumerate(item)]
        elif item != field.default and item != () and not name.endswith("init"):
            own.append(f"{name}={item}")
    lines = [f"{type(value).__name__}({', '.join(own)})"]
    for name, part in parts:
        if type(part).__name__ == "Blocks" and not part.blocks:
            continue
        lines.append(f"{pad}  {name}: {draw(part, indent + 1)}")
    return "\n".join(lines)
