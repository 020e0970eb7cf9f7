"""`lm generate MODEL --prompts FILE`: many prompts, continued side by side."""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm.infer.request import Text
from lm.infer.serve import Finished, generate_many


def read_prompts(path: str) -> list[Text]:
    """Returns the prompts of a file: its lines; of a .jsonl file 'prompt' or 'messages' of each.

    Raises:
      ValueError: if there is no file, nothing in it, or a line that is no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a file of prompts: {error}") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt: give it one a line")
    if not path.endswith(".jsonl"):
        return list(lines)
    prompts: list[Text] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            prompts.append(record["messages"] if "messages" in record else record["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is no JSON object with 'prompt' or 'messages'"
            ) from error
    return prompts


def finished_before(out: Path, prompts: Sequence[Text], resume: bool) -> set[int]:
    """Returns the prompts whose texts a file holds; what a killed process cut is taken away.

    Raises:
      ValueError: if the file is there and is not to be resumed, or is of other prompts.
    """
    if not out.exists():
        return set()
    if not resume:
        raise ValueError(f"{out} exists: go on with it by --resume, or name another file")
    records, whole = [], 0
    with out.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            records.append(json.loads(line))
            whole += len(line)
    for record in records:
        index = record.get("index", -1)
        if not 0 <= index < len(prompts) or record.get("prompt") != prompts[index]:
            raise ValueError(f"{out} holds texts of other prompts: name another file")
    with out.open("r+b") as file:
        file.truncate(whole)
    return {record["index"] for record in records}


def generate_file(
    loaded: Any, path: str, out: str, *, resume: bool = False, **options: Any
) -> list[Finished]:
    """Continues the prompts of a file and writes each text as soon as it is finished.

    A line of the output is {"index", "prompt", "text", "tokens", "waited", "first_token",
    "seconds"}; see `Finished`.

    Args:
      loaded: a model with its tokenizer.
      path: see `read_prompts`.
      out: a .jsonl file.
      resume: goes on with `out`, whose texts keep the seed of their prompt.
      options: of `generate_many`.

    Raises:
      ValueError: as these functions.
    """
    prompts, target = read_prompts(path), Path(out)
    done = finished_before(target, prompts, resume)
    left = [index for index in range(len(prompts)) if index not in done]
    if not left:
        print(f"{out} holds the texts of all {len(prompts)} prompts", file=sys.stderr)
        return []
    bar = Progress(
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        disable=not sys.stdout.isatty(),
    )
    began, tokens, found = time.perf_counter(), 0, []
    texts = generate_many(loaded, prompts, only=left, **options)
    with bar, target.open("a", encoding="utf-8") as file:
        task = bar.add_task("", total=len(prompts), completed=len(done))
        for finished in texts:
            found.append(finished)
            tokens += len(finished.tokens)
            record = finished._asdict() | {
                "prompt": prompts[finished.index],
                "tokens": len(finished.tokens),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            speed = f"{tokens / (time.perf_counter() - began):,.1f} tokens/s"
            bar.update(task, advance=1, description=speed)
    seconds = time.perf_counter() - began
    first = [finished.waited + finished.first_token for finished in found]
    print(
        f"{len(found)} texts, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:,.1f} tokens/s"
        f"; the first token after {statistics.median(first):.2f} s (median), {max(first):.2f} s "
        f"(longest), compiling and waiting included; {out}",
        file=sys.stderr,
    )
    return found
