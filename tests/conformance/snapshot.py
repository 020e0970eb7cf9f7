"""Writes paths.json, the parameter paths and shapes of every family's tiny model."""

import json
import pathlib

from lm.core.paths import flatten
from lm.models import params as P
from tests.conformance.harness import FAMILIES

if __name__ == "__main__":
    found = {
        name: {p: list(leaf.shape) for p, leaf in flatten(P.abstract(f.build(**f.tiny))).items()}
        for name, f in FAMILIES.items()
    }
    path = pathlib.Path(__file__).parent / "paths.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
