"""What stands before and after a text that a model reads."""

import dataclasses

from lm.data.tokenizer import char_tokenizer, train_bpe
from lm.infer.rows import encode, encode_both_ends


def test_the_start_of_a_text():
    tokenizer = train_bpe(["a b"], 260)
    ids = tokenizer.encode("a b")
    assert encode(tokenizer, "a b") == [tokenizer.bos_id, *ids]
    assert encode_both_ends(tokenizer, "a b") == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    bare = dataclasses.replace(tokenizer, starts=False)
    assert encode(bare, "a b") == ids
    assert encode(bare, "") == [bare.bos_id]  # Something has to be read.
    assert encode(dataclasses.replace(tokenizer, bos=None), "a b") == [tokenizer.eos_id, *ids]
    assert encode(dataclasses.replace(tokenizer, bos=None, eos=None), "a b") == ids
    letters = char_tokenizer("ab")
    assert encode(letters, "ab") == [letters.bos_id, *letters.encode("ab")]
