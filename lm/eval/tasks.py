"""Benchmarks that people know, by the likelihood of their answers: LAMBADA, HellaSwag, ARC, ..."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm.eval.requests import TASKS, Item, check_request, load_items
from lm.infer.score import (
    Likelihood,
    check_causal,
    encode_pair,
    loglikelihood_tokens,
    num_too_long,
)

Metrics = dict[str, float]


class Scored(NamedTuple):
    """What a model says of a benchmark.

    Attributes:
      likelihoods: of each item, one for each of its choices.
      tokens: how many were read, contexts included, once for each choice.
      too_long: requests that were cut on the left to the model's positions.
      seconds: time taken, with that of compiling.
    """

    likelihoods: list[list[Likelihood]]
    tokens: int
    too_long: int
    seconds: float


def run_tasks(
    loaded: Any,
    names: Iterable[str],
    *,
    limit: int | None = None,
    shots: int = 0,
    batch_size: int = 32,
    echo: Callable[[str], None] = print,
) -> dict[str, Metrics]:
    """Returns the metrics of a model on benchmarks, and prints each as it is measured.

    Args:
      loaded: has `.model`, `.params`, `.tokenizer` and `.dtype`.
      names: of `lm.eval.requests.TASKS`.
      limit: only the first so many items of each; None is all.
      shots: how many examples stand before each question.
      batch_size: requests that are read at once.
      echo: prints a line.

    Returns:
      By task: what `summarize` returns, with the number of 'items', 'requests', 'shots', requests
      'too_long', 'tokens' and 'seconds', 'tokens_per_second' and 'items_per_second'.

    Raises:
      ValueError: if there is no such task, nothing to evaluate, no package to read it from; or the
        model has no tokenizer, or is bidirectional.
    """
    names = check_request(names, shots, limit)
    if batch_size < 1:
        raise ValueError(f"a batch holds 1 request or more, not {batch_size}")
    if loaded.tokenizer is None:
        raise ValueError(
            f"{loaded.name or 'this model'} has no tokenizer, and benchmarks are text: put its "
            "tokenizer.json beside its weights"
        )
    check_causal(loaded.model)
    # All are read before anything is computed, so that what is missing is said at once.
    tasks = {name: load_items(name, shots, limit) for name in names}
    found = {}
    echo(HEADER)
    for name, items in tasks.items():
        scored = score_items(loaded, items, batch_size=batch_size, title=name)
        metrics = summarize(items, scored.likelihoods, word=TASKS[name].word)
        found[name] = metrics | {
            "items": len(items),
            "requests": sum(len(item.pairs) for item in items),
            "shots": shots,
            "too_long": scored.too_long,
            "tokens": scored.tokens,
            "seconds": scored.seconds,
            "tokens_per_second": scored.tokens / scored.seconds,
            "items_per_second": len(items) / scored.seconds,
        }
        echo(line_of(name, found[name]))
        if scored.too_long:
            echo(
                f"  {scored.too_long:,} requests of {name} are longer than the model's "
                f"{loaded.model.max_length} positions, and were cut on the left"
            )
    return found


def score_items(
    loaded: Any, items: Sequence[Item], *, batch_size: int = 32, title: str = ""
) -> Scored:
    """Returns the likelihoods of the choices of items, under a progress bar on a terminal."""
    begin = time.perf_counter()
    pairs = [encode_pair(loaded, *pair) for item in items for pair in item.pairs]
    console = Console(stderr=True)
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task, done = bar.add_task("", total=len(pairs), speed=""), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        speed = f"{done / (time.perf_counter() - begin):,.1f} requests/s"
        bar.update(task, completed=done, speed=speed)

    with bar:
        flat = loglikelihood_tokens(
            loaded, pairs, batch_size=batch_size, dtype=loaded.dtype, on_batch=advance
        )
    ends = np.cumsum([len(item.pairs) for item in items])
    return Scored(
        [flat[end - len(item.pairs) : end] for item, end in zip(items, ends)],
        sum(len(context) + len(continuation) for context, continuation in pairs),
        num_too_long(loaded.model, pairs),
        time.perf_counter() - begin,
    )


def summarize(
    items: Sequence[Item], likelihoods: Sequence[Sequence[Likelihood]], word: bool = False
) -> Metrics:
    """Returns the metrics of a benchmark, with l the ln p of a continuation c of its context.

    Args:
      items: the questions.
      likelihoods: of each item, one for each of its choices.
      word: whether each item is one text to be completed.

    Returns:
      'accuracy': share of items whose right choice has the highest l; of texts to be completed,
        those whose every token is the likeliest.
      'accuracy_norm': the same with l / (characters of c without the space before it), as
        lm-evaluation-harness divides; not of texts to be completed.
      'accuracy_stderr', 'accuracy_norm_stderr': standard errors of these means.
      'bits_per_byte': -l of the right choices, summed, in bits, over their UTF-8 bytes with the
        space before them.
      'perplexity': exp(mean of -l), by the word and not by the token; of texts to be completed.
    """
    gold = [scores[item.gold] for item, scores in zip(items, likelihoods)]
    nats = -math.fsum(score.sum for score in gold)
    num_bytes = sum(len(item.pairs[item.gold][1].encode()) for item in items)
    metrics = {"bits_per_byte": nats / math.log(2) / num_bytes}
    if word:
        metrics["perplexity"] = float(np.exp(nats / len(items)))
        return mean_of("accuracy", [score.is_greedy for score in gold]) | metrics
    best, best_norm = [], []
    for item, scores in zip(items, likelihoods):
        sums = np.array([score.sum for score in scores])
        lengths = np.array([max(len(text.lstrip()), 1) for _, text in item.pairs])
        best.append(int(sums.argmax()) == item.gold)
        best_norm.append(int((sums / lengths).argmax()) == item.gold)
    return mean_of("accuracy", best) | mean_of("accuracy_norm", best_norm) | metrics


def mean_of(name: str, hits: Sequence[bool]) -> Metrics:
    """Returns a share and the standard error of it as a mean: sd / sqrt(n), sd of n - 1."""
    found = {name: float(np.mean(hits))}
    if len(hits) > 1:
        found[f"{name}_stderr"] = float(np.std(hits, ddof=1) / math.sqrt(len(hits)))
    return found


HEADER = (
    f"{'task':<14} {'shots':>5} {'items':>7} {'accuracy':>15} {'by length':>15} "
    f"{'perplexity':>10} {'bits/byte':>9} {'tokens/s':>9} {'items/s':>8}"
)


def line_of(name: str, metrics: Metrics) -> str:
    """Returns a task's line of the table; '-' stands where a task has no such metric."""

    def share(key: str) -> str:
        if key not in metrics:
            return "-"
        error = metrics.get(f"{key}_stderr")
        return f"{metrics[key]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    perplexity = f"{metrics['perplexity']:.2f}" if "perplexity" in metrics else "-"
    return (
        f"{name:<14} {metrics['shots']:>5} {metrics['items']:>7,} {share('accuracy'):>15} "
        f"{share('accuracy_norm'):>15} {perplexity:>10} {metrics['bits_per_byte']:>9.4f} "
        f"{metrics['tokens_per_second']:>9,.0f} {metrics['items_per_second']:>8.1f}"
    )


def write_evaluation(run_dir: str | Path, model: str, results: dict[str, Metrics]) -> Path:
    """Writes `run_dir`/evaluation.json, whole or not at all; what was there is replaced."""
    path = Path(run_dir) / "evaluation.json"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"model": model, "tasks": results}, indent=1) + "\n")
    os.replace(scratch, path)
    return path
