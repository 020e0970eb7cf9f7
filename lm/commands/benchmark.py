"""What `lm evaluate MODEL --tasks ...` does."""

from collections.abc import Sequence
from pathlib import Path

from lm.eval.requests import check_request
from lm.eval.tasks import Metrics, run_tasks, write_evaluation
from lm.interop.loaded import Loaded


def task_names(tasks: str, data: str, limit: int | None, num_fewshot: int) -> list[str]:
    """Returns the names of tasks that stand with commas between, after checking what is asked.

    Raises:
      ValueError: as of `check_request`; or there are other data too.
    """
    if data:
        raise ValueError("--tasks and --data exclude each other: give one of them")
    return check_request((name for name in tasks.split(",") if name), num_fewshot, limit)


def benchmark(
    loaded: Loaded, names: Sequence[str], limit: int | None, num_fewshot: int, batch_size: int
) -> dict[str, Metrics]:
    """Measures a model on benchmarks and prints a table; of a run, writes evaluation.json too.

    Args:
      loaded: what `load` returned.
      names: the tasks.
      limit: only the first so many items of each; None is all.
      num_fewshot: examples before each question.
      batch_size: requests that are read at once.
    """
    found = run_tasks(loaded, names, limit=limit, shots=num_fewshot, batch_size=batch_size)
    if (Path(loaded.name) / "checkpoints").is_dir():
        print(f"everything is in {write_evaluation(loaded.name, loaded.name, found)}")
    return found
