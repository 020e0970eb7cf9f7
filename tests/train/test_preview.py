"""The example printed before step 0."""

import numpy as np

from lm.core.batch import Batch
from lm.data.instructions import InstructionData
from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.train.preview import first_example, show_example
from tests.data.chats import chat_tokenizer
from tests.data.test_instructions import ASKED, write
from tests.train.toy import make_batch


def test_replies_stand_in_brackets(tmp_path):
    data = InstructionData(write(tmp_path / "train.jsonl", [{"messages": ASKED}])).make(
        chat_tokenizer()
    )
    lines: list[str] = []
    show_example(next(data.train(2, 0)), data.tokenizer, lines.append)
    assert lines == [
        "an example, of which the tokens in [brackets] train:\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n[yes<|im_end|>]\n"
    ]


def test_nothing_is_shown_where_all_tokens_train():
    lines: list[str] = []
    show_example(make_batch(0, 4), None, lines.append)
    assert not lines


def test_weights_of_the_tokens_themselves():
    """Where targets are labels of the tokens, the weight of a place is that of its token."""
    row = np.array([[1, 2, 3, 0]])
    batch = Batch(row, row * 0, np.array([[0.0, 1, 1, 0]]), np.array([[1, 1, 1, 0]]))
    assert first_example(batch, teeny_gpt_tokenizer()) == [("a", False), ("bc", True)]
    assert first_example(batch, None) == [("1", False), ("2 3", True)]
