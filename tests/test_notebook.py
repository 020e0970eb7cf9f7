"""The notebook runs from top to bottom without a network, and learns."""

import pathlib
import re

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]


def test_quickstart(tmp_path, monkeypatch):
    # The tests' eight devices are no user's; and it compiles much and computes little.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    notebook = nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs to commit it"
    NotebookClient(
        notebook,
        timeout=180,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is shown"
    numbers = re.fullmatch(r"loss ([\d.]+) at step \d+, ([\d.]+) at step 60\n", outputs[-1].text)
    assert numbers is not None, outputs[-1]
    first, last = map(float, numbers.groups())
    assert last < first - 0.3
    assert (tmp_path / "runs/quickstart/checkpoints/60").is_dir()
