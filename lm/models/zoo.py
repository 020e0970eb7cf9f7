"""All families by name."""

import importlib
import pkgutil

import flax.linen as nn

from lm.models import families
from lm.models.family import Family


def all_families() -> dict[str, Family]:
    """Returns name -> family, for every file in lm/models/families."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(families.__path__)):
        family = importlib.import_module(f"{families.__name__}.{module}").FAMILY
        found[family.name] = family
    return found


def get_family(name: str) -> Family:
    """Returns a family by name; ValueError with the names there are."""
    found = all_families()
    if name not in found:
        raise ValueError(f"no family {name!r}; there are {', '.join(found)}")
    return found[name]


def family_of_config(values: dict) -> Family:
    """Returns the family that reads a Hugging Face config, by its `model_type`."""
    model_type = values.get("model_type")
    known = {kind: family for family in all_families().values() for kind in family.classes}
    if model_type not in known:
        raise ValueError(
            f"no family reads model_type {model_type!r}; known are {', '.join(sorted(known))}"
        )
    return known[model_type]


def family_of(model: nn.Module) -> Family:
    """Returns the family whose config describes exactly this model; ValueError if none does."""
    reasons = []
    for family in all_families().values():
        try:
            family.write_config(model)
            return family
        except ValueError as error:
            reasons.append(f"{family.name}: {error}")
    raise ValueError("no family's Hugging Face form fits this model. " + "; ".join(reasons))
