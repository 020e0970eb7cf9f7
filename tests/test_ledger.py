"""docs/ledger.md says what the tests show: the same rows, the same tests, files that are there."""

import ast
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator

from lm.models.zoo import all_families

ROOT = pathlib.Path(__file__).parents[1]
ROW = re.compile(
    r"^\| (?P<row>[A-Z]\d+) \| (?P<what>[^|]+) \| (?P<where>[^|]+) \| (?P<tests>[^|]+) \|$"
)


def rows_of(decorator: ast.expr) -> Iterator[str]:
    """Yields the rows that a decorator names, also through the marks of `pytest.param`."""
    for node in ast.walk(decorator):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.ledger":
            for argument in node.args:
                assert isinstance(argument, ast.Constant), ast.unparse(node)
                yield str(argument.value)


def marked_tests() -> dict[str, set[str]]:
    """Returns row -> the tests that carry its mark, 'data/test_tokenizer.py::test_all_bytes'."""
    found = defaultdict(set)
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        name = file.relative_to(ROOT / "tests")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    for row in rows_of(decorator):
                        found[row].add(f"{name}::{node.name}")
    return found


def listed() -> dict[str, re.Match]:
    """Returns row -> its line in docs/ledger.md."""
    lines = (ROOT / "docs/ledger.md").read_text().splitlines()
    matches = [ROW.match(line) for line in lines if re.match(r"\| [A-Z]\d", line)]
    assert all(matches), "a row of docs/ledger.md has not the columns row, what, where, tests"
    rows = [match["row"] for match in matches if match]
    assert rows == sorted(set(rows)), "rows of docs/ledger.md are in order, each once"
    return {match["row"]: match for match in matches if match}


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_the_same_rows():
    here, there = listed().keys(), marked_tests().keys()
    assert not there - here, f"marked in tests and not in docs/ledger.md: {sorted(there - here)}"
    assert not here - there, f"in docs/ledger.md and marked by no test: {sorted(here - there)}"


def test_the_same_tests():
    marked = marked_tests()
    wrong = {
        row: sorted(marked[row])
        for row, match in listed().items()
        if quoted(match["tests"]) != marked[row]
    }
    assert not wrong, f"docs/ledger.md should list these tests: {wrong}"


def test_everything_lies_where_it_says():
    for row, match in listed().items():
        paths = quoted(match["where"])
        assert paths, f"{row} lies nowhere"
        for path in paths:
            assert (ROOT / path).exists(), f"{row}: there is no {path}"


def test_rows_of_families_are_listed():
    for family in all_families().values():
        missing = set(family.ledger) - listed().keys()
        assert not missing, f"{family.name} serves {missing}, which docs/ledger.md lacks"
