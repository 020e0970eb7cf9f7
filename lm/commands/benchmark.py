"""What `lm evaluate MODEL --tasks ...` does."""

from pathlib import Path

from lm.eval.requests import check_request
from lm.eval.tasks import Metrics, run_tasks, write_evaluation
from lm.opening import load


def benchmark(
    model: str, tasks: str, limit: int | None, num_fewshot: int, batch_size: int
) -> dict[str, Metrics]:
    """Measures a model on benchmarks and prints a table; of a run, writes evaluation.json too.

    Args:
      model: anything that `load` opens.
      tasks: names with commas between.
      limit: only the first so many items of each task; None is all.
      num_fewshot: examples before each question.
      batch_size: requests that are read at once.
    """
    names = check_request((name for name in tasks.split(",") if name), num_fewshot, limit)
    if batch_size < 1:
        raise ValueError(f"a batch holds 1 request or more, not {batch_size}")
    loaded = load(model)
    found = run_tasks(loaded, names, limit=limit, shots=num_fewshot, batch_size=batch_size)
    if (Path(model) / "checkpoints").is_dir():
        print(f"everything is in {write_evaluation(model, model, found)}")
    return found
