"""Instruction data: conversations through a model's chat template, of which the replies train."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lm.data.example import Example, fingerprint
from lm.data.files import find_files, named_splits
from lm.data.packages import Package, read
from lm.data.splits import NO_START, Splits
from lm.data.text import SPLITS, key, split_of
from lm.data.tokenizer import CharTokenizer, SubwordTokenizer, Tokenizer, load_tokenizer

LLAMAFACTORY = Package(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "Apache-2.0",
)
Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class InstructionSet:
    """Where conversations come from.

    Attributes:
      about: who wrote them, and the package that carries them with its licence.
      member: the JSON file inside of the package, a list of rows.
    """

    about: str
    member: str


SETS = {
    "alpaca_en_demo": InstructionSet(
        "999 instructions with a reply each, in the manner of Alpaca (Taori et al., 2023); from "
        "llamafactory 0.9.5 (Apache-2.0)",
        "llamafactory-0.9.5/data/alpaca_en_demo.json",
    ),
    "glaive_toolcall_en_demo": InstructionSet(
        "300 conversations of several turns about calls of tools, from glaive-function-calling; "
        "from llamafactory 0.9.5 (Apache-2.0)",
        "llamafactory-0.9.5/data/glaive_toolcall_en_demo.json",
    ),
}
# Who speaks, by the names that other files give to them.
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def parse_row(row: Any) -> Conversation:
    """Returns a row of a file as messages, each with 'role' and 'content'.

    Args:
      row: {"messages": [{"role", "content"}, ...]}; {"prompt", "completion"}, of texts or of
        messages; {"instruction", "input", "output"}, where "input" may be missing, and "system"
        may be there; or {"conversations": [{"from", "value"}, ...]}, where "tools" may be there,
        and becomes the system's message.

    Raises:
      ValueError: if it is none of these, or the assistant has nothing to say in it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, not a {type(row).__name__}")
    if "messages" in row:
        messages = parse_messages(row["messages"])
    elif "prompt" in row and "completion" in row:
        messages = [
            *parse_messages(row["prompt"], "user"),
            *parse_messages(row["completion"], "assistant"),
        ]
    elif "instruction" in row and "output" in row:
        asked = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        reply = {"role": "assistant", "content": row["output"]}
        messages = parse_messages([*system, {"role": "user", "content": asked}, reply])
    elif "conversations" in row:
        system = [{"from": "system", "value": row["tools"]}] if row.get("tools") else []
        messages = parse_messages([*system, *row["conversations"]])
    else:
        raise ValueError(
            "a row has messages; prompt and completion; instruction and output; or conversations; "
            f"this one has {', '.join(row) or 'nothing'}"
        )
    replies = [message for message in messages if message["role"] == "assistant"]
    if not replies or not all(reply["content"].strip() for reply in replies):
        raise ValueError("the assistant has nothing to say in a row, or in one of its turns")
    return messages


def parse_messages(messages: Any, role: str = "") -> Conversation:
    """Returns messages with 'role' and 'content', the content a text; a text alone has `role`."""
    if isinstance(messages, str) and role:
        return [{"role": role, "content": messages}]
    try:
        return [parse_message(message) for message in messages]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"messages are a list of objects with role and content, not {messages!r:.60}: {error!r}"
        ) from error


def parse_message(message: dict[str, Any]) -> dict[str, str]:
    if message.get("tool_calls"):
        raise ValueError("a message has tool_calls: write the call into its content")
    theirs = message["role"] if "role" in message else message["from"]
    content = message["content"] if "content" in message else message["value"]
    if not isinstance(content, str):
        parts = [part["text"] if "text" in part else part["value"] for part in content]
        if any(part["type"] != "text" for part in content):
            raise ValueError("the content of a message is text, and this one has other parts")
        content = "".join(parts)
    role = ROLES.get(theirs) or theirs
    trains = float(role == "assistant")
    if message.get("loss_weight", trains) != trains:
        raise ValueError("replies train and nothing else does, and a loss_weight says otherwise")
    return {"role": role, "content": content}


def rows_of(source: str) -> Iterator[tuple[str, str | None, Any]]:
    """Yields where a row stands, the split that its file is named after, and the row as JSON.

    Raises:
      ValueError: for an unknown set, or a file that is not there or no JSON.
    """
    kind, _, path = source.partition(":")
    if kind == "jsonl" and path:
        for file, split in named_splits(find_files(path)).items():
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{file}:{number}", split, parse_json(line, file, number)
    elif source in SETS:
        rows = json.loads(read(LLAMAFACTORY, SETS[source].member))
        yield from ((f"{source}:{number}", None, row) for number, row in enumerate(rows, 1))
    else:
        raise ValueError(
            f"no instruction set {source!r}; there are {', '.join(SETS)} and jsonl:PATH"
        )


def parse_json(line: str, file: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}:{number} is not a line of JSON: {error}") from error


def conversations(source: str) -> dict[str, list[Conversation]]:
    """Returns split -> conversations, each of which is there once.

    Files called train, validation or test are those splits. Elsewhere a hash of what is asked
    first decides, 90:5:5, so that one question is never in two splits.

    Raises:
      ValueError: as of `rows_of` and `parse_row`, naming the row; or if there are none.
    """
    splits: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    seen = set()
    for where, split, row in rows_of(source):
        try:
            messages = parse_row(row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        text = key("\n".join(message["content"] for message in messages))
        if text not in seen:
            seen.add(text)
            asked = next((m["content"] for m in messages if m["role"] == "user"), text)
            splits[split or split_of(asked)].append(messages)
    if not seen:
        raise ValueError(f"{source} is empty: it has no conversation")
    return splits


@dataclass(frozen=True)
class InstructionData:
    """Conversations, of which the assistant's replies train and the rest is read.

    A conversation longer than a row is cut at its end, and left out if no reply is left.

    Attributes:
      source: a name in `SETS`, or 'jsonl:PATH', a file, directory or glob of JSON objects, one a
        line, see `parse_row`.
      tokenizer: '' for that of the model which a run starts from; or the path of a tokenizer.json,
        or of its directory, with a chat template beside it.
      length: T, places of a row.
      layout: 'fit' for as many conversations as fit a row, each a segment of its own; 'rows' for
        one.
    """

    source: str = "alpaca_en_demo"
    tokenizer: str = ""
    length: int = 256
    layout: Literal["fit", "rows"] = "fit"

    def make(self, tokenizer: Tokenizer | None = None) -> "Instructions":
        """Prepares the data, with the tokenizer of a model or run where one is given.

        Raises:
          ValueError: as of `conversations`; or for a tokenizer that is not there, or cannot chat.
        """
        return Instructions(self, tokenizer or self.make_tokenizer())

    def make_tokenizer(self) -> CharTokenizer | SubwordTokenizer:
        """Returns the tokenizer that the config names."""
        if not self.tokenizer:
            raise ValueError(NO_START)
        return load_tokenizer(self.tokenizer)


class Instructions(Splits):
    """The splits of an `InstructionData`, tokenized.

    Attributes:
      conversations: split -> messages.
      num_cut: split -> how many conversations are longer than a row, once its examples are made.
      fingerprint: changes whenever the conversations, the template or the tokens do.
    """

    tokenizer: SubwordTokenizer

    def __init__(self, config: InstructionData, tokenizer: Tokenizer):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "instructions are read through a chat template, and the tokenizer has none: start "
                "from a model that chats, or put a chat_template.jinja beside the tokenizer.json"
            )
        if config.layout not in ("fit", "rows"):
            raise ValueError(
                f"the layout of conversations is 'fit' or 'rows', not {config.layout!r}"
            )
        self.config = config
        self.conversations = conversations(config.source)
        self.num_cut: dict[str, int] = {}
        super().__init__(self._examples, tokenizer, config.length, config.layout)
        self.fingerprint = fingerprint(json.dumps(self.conversations), tokenizer)

    @property
    def about(self) -> str:
        """What became of the training split, in words."""
        kept = len(self.examples("train"))
        return (
            f"{kept:,} conversations, {self.num_cut['train']:,} of them cut to "
            f"{self.config.length} places; {len(self.conversations['train']) - kept:,} left out, "
            "whose replies begin behind that"
        )

    def _examples(self, split: str) -> list[Example]:
        """Returns the conversations of a split; tokens of replies have weight 1, others 0.

        Raises:
          ValueError: if all tokens have the same weight, or the template hides a reply.
        """
        if split not in self.conversations:
            raise ValueError(f"there is no split {split!r}, only {', '.join(SPLITS)}")
        examples, places = [], self.config.length + 1
        self.num_cut[split] = 0
        for messages in self.conversations[split]:
            ids, replies = self.tokenizer.encode_replies(messages)
            weights = np.array(replies[:places], bool).astype(np.float32)
            if weights[1:].any():
                self.num_cut[split] += len(ids) > places
                examples.append(Example(np.array(ids[:places], np.int32), weights))
        if self.conversations[split] and not examples:
            raise ValueError(
                f"no token of the {split} split trains: no reply begins within "
                f"{self.config.length} places, so make data.length larger"
            )
        if examples and all(example.weights[1:].all() for example in examples):
            raise ValueError(
                f"every token of the {split} split trains, and only replies should: the chat "
                "template writes nothing else, or marks all of it"
            )
        return examples
