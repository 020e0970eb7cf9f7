"""Directories without a tokenizer.json are read as transformers reads them."""

import json

import pytest

from lm.data.tokenizer import train_bpe, train_wordpiece
from lm.data.vocab_files import load_directory_tokenizer
from tests.interop.test_gguf import TEXTS
from tests.interop.tiny_gguf import TEXT

transformers = pytest.importorskip("transformers")
SPECIAL = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}


def vocabulary_of(tokenizer) -> list[str]:
    vocabulary = tokenizer.library.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"do_lower_case": True, **SPECIAL, "mask_token": "[MASK]"},
        {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False},
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True},
    ],
)
def test_wordpiece(config, tmp_path):
    tokens = vocabulary_of(train_wordpiece([TEXT, *TEXTS], 200))
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_directory_tokenizer(tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    for text in [TEXT, *TEXTS, "[MASK] and [CLS]"]:
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=True) == expected, text
    assert (ours.pad_id, ours.bos_id, ours.eos_id) == (
        theirs.pad_token_id,
        theirs.cls_token_id,
        theirs.sep_token_id,
    )


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "GPT2Tokenizer"}, "added"])
def test_byte_pairs(config, tmp_path):
    tokenizer = train_bpe([TEXT, *TEXTS], 320)
    model = json.loads(tokenizer.library.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (tmp_path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    if config == "added":
        config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 320}))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_directory_tokenizer(tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in [TEXT, *TEXTS, "a <|endoftext|> b<|im_end|>"]:
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=True) == expected, text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.encode("<|endoftext|>")[0] != ours.bos_id


def test_others_are_named(tmp_path):
    assert load_directory_tokenizer(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')
    with pytest.raises(ValueError, match=r"EsmTokenizer and no tokenizer\.json"):
        load_directory_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").rename(tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no byte-level BPE"):
        load_directory_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 7}')
    with pytest.raises(ValueError, match="'<x>' cannot have the id 7"):
        load_directory_tokenizer(tmp_path)
