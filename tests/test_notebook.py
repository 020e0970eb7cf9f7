"""The notebooks run from top to bottom without a network, and learn."""

import json
import pathlib
import re
import resource

import nbformat
import pytest
from nbclient import NotebookClient

from lm.interop.named import locate

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def offline(monkeypatch):
    # The tests' eight devices are no user's.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def execute(name: str, folder: pathlib.Path) -> list[nbformat.NotebookNode]:
    """Runs a notebook in an empty folder; returns what its cells put out, in order."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs to commit it"
    metadata = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=metadata).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.ledger("D11")
@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch, offline):
    """In three minutes it trains, samples and adapts, and the last cell prints lower losses."""
    # It compiles much and computes little.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    outputs = execute("quickstart.ipynb", tmp_path)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: other tests run beside this one.
    spent = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    assert 5 < spent < 180
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is shown"
    numbers = re.fullmatch(
        r"headlines: loss ([\d.]+) at step \d+, ([\d.]+) at step 60\n"
        r"LoRA on the weather: loss ([\d.]+) at step \d+, ([\d.]+) at step 30\n",
        outputs[-1].text,
    )
    assert numbers is not None, outputs[-1]
    first, last, before, after = map(float, numbers.groups())
    assert last < first - 0.3 and after < before - 0.3
    assert (tmp_path / "runs/quickstart/checkpoints/60").is_dir()


@pytest.mark.slow
def test_finetune(tmp_path, offline):
    """After LoRA on fifty examples the model answers other questions in their form; peft agrees."""
    pytest.importorskip("peft")
    locate("package:smollm2-135m-instruct")
    outputs = execute("finetune.ipynb", tmp_path)
    printed = [output.text for output in outputs if output.get("name") == "stdout"]
    replies = [
        [line for line in text.splitlines() if "Egypt" in line or "Cairo" in line]
        for text in printed
    ]
    before, after = [lines[0] for lines in replies if lines]
    assert not before.startswith("{") and json.loads(after)["country"] == "Egypt", (before, after)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    difference = re.search(r"logits differ by ([\d.e-]+) at most", "".join(printed))
    assert difference and float(difference[1]) < 1e-3
    numbers = re.search(r"loss ([\d.]+) at the first step, ([\d.]+) at the last", printed[-1])
    assert numbers and float(numbers[2]) < 0.5 * float(numbers[1])
