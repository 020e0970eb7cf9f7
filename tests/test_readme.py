"""Every block of the documents that is marked runnable runs, and what they count is so.

A block is marked by `<!-- runnable -->` on the line before it, or by `<!-- runnable: PATH -->`,
which writes it to that file instead. The blocks of a document run in order, in a directory of their
own that has this repository's experiments and a text `my.txt`. So that they run here, and quickly:

* `pip install` is not done again: it checks that what it would install is installed, extras too;
* `lm train` gets the overrides `QUICK` after its own;
* `pytest` is given one small file, since it is what runs this test.
"""

import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from lm.models import params as P
from lm.models.zoo import all_families

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "docs/guide.md", "docs/porting.md")
BLOCK = re.compile(
    r"<!-- runnable(?:: (?P<path>\S+))? -->\n```(?P<kind>\w+)\n(?P<text>.*?)```", re.S
)
QUICK = "--train.steps 3 --train.batch-size 4 --train.micro-batches 1 --train.eval-every 0"
PRELUDE = f"""
set -euo pipefail
pip() {{ [ "$1" = install ] && "$PYTHON" "$ROOT/tests/test_readme.py" "$@"; }}
pytest() {{ (cd "$ROOT" && "$PYTHON" -m pytest "$@" -q tests/core/test_config.py); }}
lm() {{
  if [ "$1" = train ]; then set -- "$@" {QUICK}; fi
  "$PYTHON" -m lm.cli "$@"
}}
"""


class Block(NamedTuple):
    """A marked block: where it is to be written, or ''; its language; its text."""

    path: str
    kind: str
    text: str


def blocks_of(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    found = [Block(m["path"] or "", m["kind"], m["text"]) for m in BLOCK.finditer(text)]
    assert len(found) == text.count("<!-- runnable"), f"{document}: a marker without a block"
    return found


def run_block(block: Block, folder: pathlib.Path) -> str:
    """Runs a block in a directory, as a user would after installing; returns what it printed."""
    if block.path:
        (folder / block.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.path).write_text(block.text)
        return ""
    commands = {
        "python": [sys.executable, "-c", block.text],
        "sh": ["bash", "-c", PRELUDE + block.text],
    }
    # The tests' eight devices and the variables of a pytest that runs already are no user's.
    tests_own = ("XLA_FLAGS", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(tests_own)}
    env |= {"PYTHON": sys.executable, "ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # It compiles much and computes little.
    done = subprocess.run(
        commands[block.kind], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def make_folder(folder: pathlib.Path) -> pathlib.Path:
    (folder / "experiments").mkdir()
    for file in (ROOT / "experiments").glob("*.py"):
        (folder / "experiments" / file.name).symlink_to(file)
    lines = [f"The quick brown fox number {n} jumps over {n * n} lazy dogs." for n in range(400)]
    (folder / "my.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.ledger("D12")
@pytest.mark.parametrize(
    "document",
    [pytest.param(d, marks=[pytest.mark.slow] if "guide" in d else []) for d in DOCUMENTS],
)
def test_marked_blocks_run(document, tmp_path):
    folder = make_folder(tmp_path)
    for block in blocks_of(document):
        run_block(block, folder)
    if document == "README.md":
        assert (folder / "runs/headlines/checkpoints").is_dir()


@pytest.mark.ledger("D12")
def test_the_first_screen_has_the_two_commands():
    first_screen = README.splitlines()[:20]
    commands = "\n".join(block.text for block in blocks_of("README.md")[:2])
    for command in (
        "pip install -e . && lm train experiments/headlines.py",
        "pip install -e '.[test]' && pytest -n 2",
    ):
        assert command in first_screen
        assert command in commands


def test_a_failing_block_is_noticed(tmp_path):
    for text in ("false | cat", "pip install -e '.[absent]' && true"):
        with pytest.raises(AssertionError):
            run_block(Block("", "sh", text), tmp_path)


def test_parameter_counts():
    """The README's table has every family and preset, with the number that `eval_shape` gives."""
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", README, re.M))
    shown = {
        name: dict(re.findall(r"([\w.-]+) ([\d,]{4,})(?:, |$)", row))
        for name, row in table.items()
        if name in all_families()
    }
    assert shown == {
        name: {preset: f"{P.count(family.preset(preset)):,}" for preset in family.presets}
        for name, family in all_families().items()
    }


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_lead_somewhere(document):
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
        if "://" not in target:
            assert (file.parent / target).exists(), f"{document} links to {target}"


def check_installed(arguments: list[str]) -> None:
    """Raises unless `pip install -e .` with these extras would find everything there."""
    from importlib.metadata import distribution

    from packaging.requirements import Requirement

    assert arguments[:2] == ["install", "-e"] and len(arguments) == 3, arguments
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[2])
    assert extras is not None, arguments
    lm = distribution("lm")
    wanted = set((extras[1] or "").split(",")) - {""}
    assert wanted <= set(lm.metadata.get_all("Provides-Extra") or []), wanted
    assert any(entry.name == "lm" for entry in lm.entry_points)
    for text in lm.requires or []:
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *wanted)):
            found = distribution(need.name).version
            assert need.specifier.contains(found, prereleases=True), f"{text}, not {found}"


if __name__ == "__main__":
    check_installed(sys.argv[1:])
