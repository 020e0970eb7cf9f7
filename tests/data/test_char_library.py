"""Character tokenizers give the same ids in the form of the tokenizers library."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.char_library import library_form
from lm.data.text import fold
from lm.data.tokenizer import (
    SubwordTokenizer,
    char_tokenizer,
    load_tokenizer,
    teeny_gpt_tokenizer,
    train_bpe,
)

LETTERS = "abcdefghij klmnopqrstuvwxyzAB,.é"
OURS = {
    "teeny_gpt": teeny_gpt_tokenizer(),
    "drop": char_tokenizer(LETTERS, "drop"),
    "unk": char_tokenizer(LETTERS, "unk"),
}
THEIRS = {name: library_form(tokenizer) for name, tokenizer in OURS.items()}


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from(LETTERS + "Éßﬁŉſẞİ<pad>")))
def test_same_ids(name, text):
    ours, theirs = OURS[name], THEIRS[name]
    assert theirs.encode(text) == ours.encode(text)
    if name != "unk":  # Ours decodes it to U+FFFD, and a special token there is left out.
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.slow
def test_every_character_is_folded_alike():
    ours, theirs = OURS["teeny_gpt"], THEIRS["teeny_gpt"]
    every = [c for c in map(chr, range(sys.maxunicode + 1)) if not "\ud800" <= c <= "\udfff"]
    assert theirs.encode("".join(every)) == ours.encode("".join(every))
    odd = [c for c in every if fold(c).isascii() and not c.isascii()]
    assert len(odd) > 400 and theirs.encode_batch(odd) == ours.encode_batch(odd)


@pytest.mark.parametrize("name", OURS)
def test_saved_and_read_again(name, tmp_path):
    THEIRS[name].save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, SubwordTokenizer) and again.vocab_size == OURS[name].vocab_size
    for kind in ("pad_id", "bos_id", "eos_id"):
        assert getattr(again, kind) == getattr(OURS[name], kind)
    assert again.encode("Café, ﬁ! <pad>") == OURS[name].encode("Café, ﬁ! <pad>")
    assert again.others == ((("unk", "<unk>"),) if name == "unk" else ())


def test_others_stay_as_they_are():
    tokenizer = train_bpe(["a b"], 260)
    assert library_form(tokenizer) is tokenizer
    assert library_form(None) is None
