"""Directories that appear whole or not at all, and the JSON in them."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Gives a scratch directory that becomes `path` at the end, or vanishes with an error.

    Raises:
      ValueError: if `path` exists.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises ValueError if there is something at a path that is to be written."""
    if path.exists():
        raise ValueError(f"{path} exists already: choose another directory, or remove it first")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file; ValueError if it is missing or no JSON."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object, indented."""
    path.write_text(json.dumps(values, indent=2) + "\n")
