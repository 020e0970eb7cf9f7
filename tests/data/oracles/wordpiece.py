"""What the pure-Python `BertTokenizer` of transformers 4 makes of 10,000 lines; version 5 has none.

    LM_TRANSFORMERS4=/path/to/python python -m tests.data.oracles.wordpiece

writes wordpiece.json: a digest of the ids of every hundred lines. The interpreter that the variable
names has transformers 4.57 and needs no torch: `uv venv ENV && uv pip install -p ENV/bin/python
transformers==4.57.6`.
"""

import hashlib
import itertools
import json
import os
import pathlib
import subprocess

from lm.data.source import load_source
from lm.interop.named import locate

FILE = pathlib.Path(__file__).with_suffix(".json")
CHUNK = 100
LINES = 10_000
PROGRAM = """
import json, sys, transformers
from transformers.models.bert.tokenization_bert import BertTokenizer
tokenizer = BertTokenizer.from_pretrained(sys.argv[1])
assert not tokenizer.is_fast and transformers.__version__.startswith("4.57")
ids = [tokenizer(line, add_special_tokens=False).input_ids for line in json.load(sys.stdin)]
json.dump({"transformers": transformers.__version__, "python": sys.version.split()[0], "ids": ids},
          sys.stdout)
"""


def lines() -> list[str]:
    """Returns headlines; every tenth has something odd, or is that alone.

    That is what stands in odd.json: accents and combining marks, other scripts, emoji, control and
    format characters, all kinds of white space, words of a hundred characters and more. Characters
    that Unicode got after version 8 are not there: the library's tables of categories are of that
    age, and those of the pure-Python tokenizer are Python's own.
    """
    odd_texts = json.loads(FILE.with_name("odd.json").read_text())
    headlines = load_source("headlines", "train")
    found = [text.text for text in itertools.islice(headlines, LINES)]
    for number, index in enumerate(range(0, LINES, 10)):
        turn, which = divmod(number, len(odd_texts))
        line, odd = found[index], odd_texts[which]
        middle, gap, alone = len(line) // 2, ("", " ")[turn % 2], turn % 5 == 4
        found[index] = odd if alone else f"{line[:middle]}{gap}{odd}{gap}{line[middle:]}"
    return found


def digests(rows: list) -> list[str]:
    """Returns one sha256, in hexadecimal, for every `CHUNK` rows."""
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    return [hashlib.sha256(json.dumps(chunk).encode()).hexdigest() for chunk in chunks]


def theirs(python: str, texts: list[str]) -> dict:
    """Returns the ids that an interpreter's `BertTokenizer` gives, and the versions."""
    command = [python, "-c", PROGRAM, str(locate("all-minilm-l6-v2"))]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, check=True, env=env
    )
    return json.loads(done.stdout)


def main() -> None:
    texts = lines()
    found = theirs(os.environ["LM_TRANSFORMERS4"], texts)
    found |= {"lines": digests(texts), "ids": digests(found["ids"])}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
