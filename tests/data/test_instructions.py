"""Instruction data: what is read, what trains in it, and what is refused."""

import json

import numpy as np
import pytest

from lm.data.instructions import SETS, InstructionData, conversations, parse_row
from lm.data.text import split_of
from lm.data.tokenizer import load_tokenizer, train_bpe
from tests.data.chats import CHATML, MARKED, chat_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is gravity? 🙂"},
    {"role": "assistant", "content": "It pulls: 🙂\n\nalways."},
    {"role": "tool", "content": "4"},
    {"role": "user", "content": "Add 2 and 2."},
    {"role": "assistant", "content": " It is 4."},
]
ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{path}"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_replies_equal_those_of_transformers(template, tmp_path):
    """Ids and mask are those that transformers finds by the marks, with marks and without."""
    transformers = pytest.importorskip("transformers")
    chat_tokenizer(MARKED).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = chat_tokenizer(template)
    ids, replies = tokenizer.encode_replies(TALK)
    assert ids == theirs["input_ids"]
    assert [int(number > 0) for number in replies] == theirs["assistant_masks"]
    for number, message in ((1, TALK[2]), (2, TALK[5])):
        spoken = [token for token, found in zip(ids, replies) if found == number]
        assert tokenizer.decode(spoken, special=True) == message["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    "template, trained",
    [
        # Without special tokens a reply goes on to where the next turn begins.
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "yes\n"),
        # Without a prompt that asks for a reply, the model has to begin it too.
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "assistant: yes\n"),
        # What the template writes of a reply before and after its content.
        ("{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
         "<think>\n{{ m.content | trim }}<|im_end|> {% endif %}{% endfor %}",
         "<think>\nyes<|im_end|>"),
    ],
)  # fmt: skip
def test_where_a_reply_ends(template, trained):
    tokenizer = chat_tokenizer(template)
    ids, replies = tokenizer.encode_replies(ASKED)
    found = [token for token, number in zip(ids, replies) if number]
    assert tokenizer.decode(found, special=True) == trained


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0].content }}", "hides or rewrites the reply 'yes'"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "hides or rewrites"),
        (MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% endg", "{% endg"), "or rewrites"),
        ("{% generation %}hi yes{% endgeneration %}" * 2, "marks 2 replies"),
        ("{{ messages | length }}" + CHATML, "once it goes on"),
        ("{{ raise_exception('no system') }}", "no system"),
    ],
)  # fmt: skip
def test_templates_that_do_not_show_replies(template, message):
    with pytest.raises(ValueError, match=message):
        chat_tokenizer(template).encode_replies(ASKED)


def test_forms_of_rows():
    """The same conversation in all the forms that a file may have."""
    expected = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}]
    user, reply = ({"role": r, "content": c} for r, c in (("user", "a\nb"), ("assistant", "c")))
    spoken = [{"from": "human", "value": "a\nb"}, {"from": "gpt", "value": "c"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a\n"},
                                          {"type": "text", "value": "b"}]}, reply]  # fmt: skip
    rows = [
        {"messages": [user, reply]},
        {"messages": [{**user, "loss_weight": 0.0}, {**reply, "loss_weight": 1.0}]},
        {"messages": parts},
        {"prompt": "a\nb", "completion": "c"},
        {"prompt": [user], "completion": [reply]},
        {"instruction": "a", "input": "b", "output": "c"},
        {"instruction": "a\nb", "input": "", "output": "c"},
        {"instruction": "a\nb", "output": "c"},
        {"conversations": spoken},
    ]
    assert all(parse_row(row) == expected for row in rows)
    system = {"role": "system", "content": "d"}
    assert parse_row({**rows[5], "system": "d"}) == [system, *expected]
    assert parse_row({**rows[8], "tools": "d"}) == [system, *expected]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a"}, "this one has text"),
        ({"messages": [ASKED[0]]}, "nothing to say"),
        ({"prompt": "a", "completion": "  "}, "nothing to say"),
        ({"messages": [{"role": "user"}, ASKED[1]]}, "role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": ""}]}, ASKED[1]]},
         "other parts"),
        ({"messages": [ASKED[0], {**ASKED[1], "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [ASKED[0], {**ASKED[1], "loss_weight": 0.0}]}, "loss_weight"),
        ({"instruction": "a", "input": 3, "output": "b"}, "int"),
        ([1], "not a list"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(row, message, tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"messages": ASKED}, row])
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{message}"):
        conversations(source)


def test_sources_that_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("{")
    for source, message in [
        (f"jsonl:{tmp_path / 'empty.jsonl'}", "is empty"),
        (f"jsonl:{tmp_path / 'bad.jsonl'}", "bad.jsonl:1 is not a line of JSON"),
        (f"jsonl:{tmp_path / 'none.jsonl'}", "found no file"),
        ("alpaca", "no instruction set 'alpaca'; there are alpaca_en_demo"),
    ]:
        with pytest.raises(ValueError, match=message):
            conversations(source)


@pytest.mark.parametrize("name, least", [("alpaca_en_demo", 985), ("glaive_toolcall_en_demo", 265)])
def test_sets(name, least):
    splits = conversations(name)
    asked = {
        split: [next(m["content"] for m in talk if m["role"] == "user") for talk in talks]
        for split, talks in splits.items()
    }
    assert sum(map(len, splits.values())) >= least
    for split, questions in asked.items():
        assert questions and all(split_of(question) == split for question in questions)
    assert {m["role"] for talks in splits.values() for t in talks for m in t} <= {
        "system", "user", "assistant", "tool"
    }  # fmt: skip
    assert "from " in SETS[name].about


def test_files_named_after_splits(tmp_path):
    for split, count in {"train": 3, "validation": 2, "test": 1}.items():
        rows = [{"prompt": f"{split} {n}", "completion": "c"} for n in range(count)]
        write(tmp_path / f"{split}.jsonl", [*rows, rows[0]])
    found = conversations(f"jsonl:{tmp_path}")
    assert {split: len(talks) for split, talks in found.items()} == {
        "train": 3, "validation": 2, "test": 1
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["fit", "rows"])
def test_batches_hold_every_reply_once(layout, tmp_path):
    """An epoch's targets of weight 1 are the replies' tokens; each conversation is a segment."""
    rows = [
        {"prompt": f"Add {n} and 2.", "completion": "It is " + "4" * (n % 7 + 1)} for n in range(40)
    ]
    data = InstructionData(write(tmp_path / "train.jsonl", rows), length=64, layout=layout).make(
        chat_tokenizer()
    )
    tokenizer = data.tokenizer
    expected = sorted([*tokenizer.encode(row["completion"]), tokenizer.end_of_turn] for row in rows)
    found = []
    for batch in data.evaluation("train", 4):
        assert ((batch.weights == 0) | (batch.segments > 0)).all()
        for row in range(4):
            for segment in range(1, batch.segments[row].max() + 1):
                here = (batch.segments[row] == segment) & (batch.weights[row] == 1)
                found.append(batch.targets[row][here].tolist())
    assert sorted(found) == expected
    assert data.about.startswith("40 conversations, 0 of them cut")


def test_long_conversations_are_cut_or_left_out(tmp_path):
    """Cut at the end of the row; left out where the reply would begin behind it."""
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 90},
        {"prompt": "a" * 90, "completion": "b"},
    ]
    source = write(tmp_path / "train.jsonl", rows)
    tokenizer = chat_tokenizer()
    data = InstructionData(source, length=32).make(tokenizer)
    kept = data.examples("train")
    assert [len(example.tokens) for example in kept][1] == 33 and len(kept) == 2
    ids, _ = tokenizer.encode_replies(data.conversations["train"][1])
    np.testing.assert_array_equal(kept[1].tokens, ids[:33])
    assert data.about == (
        "2 conversations, 1 of them cut to 32 places; 1 left out, whose replies begin behind that"
    )
    with pytest.raises(ValueError, match=r"no token of the train split trains.*within 4 places"):
        InstructionData(source, length=4).make(tokenizer).train(1, 0)


def test_masks_of_ones_are_refused(tmp_path):
    source = write(tmp_path / "train.jsonl", [{"messages": ASKED}])
    only = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="every token of the train split trains"):
        InstructionData(source).make(chat_tokenizer(only)).train(1, 0)


def test_tokenizers_that_are_refused(tmp_path):
    for tokenizer, message in [(None, "starts from none"), (train_bpe(["a"], 260), "template")]:
        with pytest.raises(ValueError, match=message):
            InstructionData("alpaca_en_demo").make(tokenizer)
    with pytest.raises(ValueError, match="'fit' or 'rows'"):
        InstructionData("alpaca_en_demo", layout="pack").make(chat_tokenizer())


def test_the_fingerprint_knows_the_template(tmp_path):
    """The tokenizer of a path is read with its template; another template is other data."""
    source = write(tmp_path / "train.jsonl", [{"messages": ASKED}])
    chat_tokenizer().save(tmp_path)
    data = InstructionData(source, tokenizer=str(tmp_path)).make()
    assert data.fingerprint == InstructionData(source).make(load_tokenizer(tmp_path)).fingerprint
    other = InstructionData(source).make(chat_tokenizer(CHATML + " "))
    assert other.fingerprint != data.fingerprint
