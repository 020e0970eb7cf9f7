"""`lm list`, `lm import`, `lm export`, `lm merge`, `lm average`: models, at rest."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from tyro.conf import Positional

from lm import leaving
from lm.core.config import fields_of
from lm.models import params as P
from lm.models.zoo import all_families, get_family


def import_model(source: Positional[str], run: Positional[str]) -> None:
    """Writes a pretrained model as a run directory, which the other commands open.

    Args:
      source: a Hugging Face directory, a .gguf file, package:NAME, a hub id, or another run.
      run: the directory to write; it must not exist.
    """
    path = leaving.import_model(source, run, echo=print)
    print(f"everything is in {path}; next: lm generate {path} --prompt '...'")


def export_model(
    model: Positional[str],
    directory: Positional[str],
    format: str = "hf",
    dtype: str = "float32",
    prompt_length: int | None = None,
    cache_length: int | None = None,
) -> None:
    """Writes a model for others to open.

    Args:
      model: a run directory, a .gguf file, package:NAME, or another that `lm.load` opens.
      directory: what to write; it must not exist.
      format: hf, which `from_pretrained` opens; merged, the same with an adapter merged; peft, the
        adapter of a run alone; or stablehlo, which jax runs without this package.
      dtype: of the weights, float32 or bfloat16.
      prompt_length: of stablehlo, places that prefill reads; half of the cache if not given.
      cache_length: of stablehlo, places for prompt and new tokens; the model's own if not given.
    """
    lengths = {"prompt_length": prompt_length, "cache_length": cache_length}
    options = {name: length for name, length in lengths.items() if length is not None}
    if options and format != "stablehlo":
        raise ValueError(f"{' and '.join(options)} are of --format stablehlo, not of {format}")
    path = leaving.export_model(model, directory, format, dtype=dtype, echo=print, **options)
    print(f"everything is in {path}")


def merge_model(model: Positional[str], run: Positional[str]) -> None:
    """Writes a model that holds an adapter as a run with the adapter merged into its kernels.

    Args:
      model: a run directory.
      run: the directory to write; it must not exist.
    """
    print(f"everything is in {leaving.merge_model(model, run, echo=print)}")


def average_models(
    models: Positional[Sequence[str]], out: str, weights: str = "", steps: str = ""
) -> None:
    """Writes the weighted mean of checkpoints as a run.

    Args:
      models: runs, or others that `lm.load` opens, of the same shapes.
      out: the directory to write; it must not exist.
      weights: one for each, such as 1,2,1; all are the same if not given.
      steps: checkpoints of one run, such as 100,200, in place of several runs.
    """
    options = {"weights": numbers(weights, float), "steps": numbers(steps, int)}
    print(f"everything is in {leaving.average_models(models, out, **options)}")


def numbers(text: str, kind: type[int] | type[float]) -> list[Any]:
    """Returns the numbers of a list with commas; ValueError for anything else."""
    try:
        return [kind(word) for word in text.split(",") if text]
    except ValueError as error:
        raise ValueError(f"{text!r} is no list such as 1,2: {error}") from error


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
