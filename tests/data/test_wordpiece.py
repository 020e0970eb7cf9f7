"""WordPiece with BERT's own vocabulary equals the pure-Python tokenizer of transformers 4.57."""

import json
import os
import pathlib
import shutil

import pytest

from lm.data.vocab_files import load_directory_tokenizer
from lm.interop.named import locate
from tests.data.oracles import wordpiece


@pytest.fixture(scope="module")
def texts():
    return wordpiece.lines()


@pytest.fixture(params=["vocab.txt", "tokenizer.json"])
def tokenizer(request, tmp_path):
    """MiniLM's tokenizer from the list of its 30,522 tokens, and from the file beside it."""
    source: pathlib.Path = locate("all-minilm-l6-v2")
    for name in (request.param, "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    found = load_directory_tokenizer(tmp_path)
    assert found.vocab_size == 30_522
    return found


@pytest.mark.ledger("L15")
def test_ten_thousand_lines_equal_bert_tokenizer(texts, tokenizer):
    """Each hundred lines have the digest that the tokenizer of transformers 4.57 gave."""
    saved = json.loads(wordpiece.FILE.read_text())
    assert saved["transformers"].startswith("4.57.") and len(texts) == 10_000
    assert wordpiece.digests(texts) == saved["lines"], "these are other lines: make the file anew"
    assert wordpiece.digests(tokenizer.encode_batch(texts)) == saved["ids"]


@pytest.fixture(scope="module")
def theirs(texts):
    if "LM_TRANSFORMERS4" not in os.environ:
        pytest.skip("LM_TRANSFORMERS4 names no interpreter with transformers 4.57")
    return wordpiece.theirs(os.environ["LM_TRANSFORMERS4"], texts)["ids"]


def test_the_digests_are_those_of_transformers(texts, tokenizer, theirs):
    for text, ours, expected in zip(texts, tokenizer.encode_batch(texts), theirs, strict=True):
        assert ours == expected, ascii(text)
    assert wordpiece.digests(theirs) == json.loads(wordpiece.FILE.read_text())["ids"]
