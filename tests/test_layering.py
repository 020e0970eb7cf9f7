"""Imports go strictly downward, files stay small, and test oracles stay in tests."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "lm").rglob("*.py"))
ROOMS = ("core", "ops", "layers", "models", "data", "interop", "infer", "eval", "train")
# The files beside the rooms stand above them all, in this order.
TOP = ("opening", "leaving", "commands", "cli", "__init__")
ORDER = (*ROOMS, *TOP)
ORACLES = {"torch", "transformers", "peft"}
MAX_LINES = 400
MAX_FAMILY_LINES = 120


def imports(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted module) of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is relative: write it in full"
            if node.module == "lm":
                yield from ((node.lineno, f"lm.{name.name}") for name in node.names)
            else:
                yield node.lineno, node.module or ""


def room_of(module: str) -> str:
    """Returns which of `ORDER` a module of `lm` belongs to; its own attributes are __init__'s."""
    _, _, inner = module.partition(".")
    first = inner.partition(".")[0]
    return first if first in ORDER else "__init__"


def room_of_file(file: pathlib.Path) -> str:
    return file.relative_to(ROOT / "lm").parts[0].removesuffix(".py")


def ours(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    for line, module in imports(file):
        if module.partition(".")[0] == "lm":
            yield line, room_of(module)


def test_every_file_has_a_room():
    assert {room_of_file(file) for file in FILES} == set(ORDER)


def test_imports_go_downward():
    wrong = []
    for file in FILES:
        here = room_of_file(file)
        for line, there in ours(file):
            # `lm.__version__` and such are attributes of the package, which all may read.
            if there != "__init__" and ORDER.index(there) > ORDER.index(here):
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)


def test_data_imports_core_only():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {there}"
        for file in FILES
        if room_of_file(file) == "data"
        for line, there in ours(file)
        if there not in ("core", "data")
    ]
    assert not wrong, "\n".join(wrong)


def test_families_are_leaves():
    """No family imports another one, so that each can be read, changed and removed alone."""
    for file in (ROOT / "lm/models/families").glob("*.py"):
        found = [module for _, module in imports(file) if module.startswith("lm.models.families")]
        assert not found, f"{file.name} imports {found}"


def test_oracles_are_never_imported():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in [*FILES, *sorted((ROOT / "experiments").glob("*.py"))]
        for line, module in imports(file)
        if module.partition(".")[0] in ORACLES
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "folder, most", [("lm", MAX_LINES), ("lm/models/families", MAX_FAMILY_LINES)]
)
def test_files_stay_small(folder, most):
    sizes = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in (ROOT / folder).rglob("*.py")
    }
    long = {name: size for name, size in sizes.items() if size > most}
    assert sizes and not long, f"over {most} lines: {long}"


def test_the_parser_sees_what_it_must(tmp_path):
    """The three spellings of an import are all found, at any depth."""
    file = tmp_path / "x.py"
    file.write_text(
        "import lm.train.loop\nfrom lm import cli\ndef f():\n    from lm.core.batch import Batch\n"
    )
    assert [there for _, there in ours(file)] == ["train", "cli", "core"]
