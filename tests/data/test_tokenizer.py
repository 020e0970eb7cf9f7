import collections
import dataclasses
import itertools
import json
import random
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.tokenizer import (
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
    char_tokenizer,
    load_tokenizer,
    teeny_gpt_tokenizer,
    train_bpe,
    train_chars,
    train_wordpiece,
)

# As OpenAI published it with GPT-2 (encoder.py).
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module")
def lines(headlines):
    return [text.text for text in headlines["validation"]]


@pytest.fixture(scope="module")
def bpe(lines):
    return train_bpe(lines, 1500)


def byte_symbols():
    """GPT-2's printable character for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return {b: chr(b) if b in printable else chr(next(rest)) for b in range(256)}


def random_unicode(rng, size):
    """Text of all categories of assigned characters, runs and repeats included."""
    text = []
    while len(text) < size:
        c = chr(rng.randrange(sys.maxunicode + 1))
        if unicodedata.category(c) in ("Cn", "Cs"):
            c = rng.choice(" \t\n\u00a0'sdtmrevl3.-aZ")
        text += [c] * rng.choice((1, 1, 1, 2))
    return "".join(text)


@pytest.mark.ledger("B07")
@given(st.text("abcxyz ÉŁ9'\n😀"))
def test_characters_round_trip(text):
    assert (t := char_tokenizer("abcxyz ÉŁ9'\n😀")).decode(t.encode(text)) == text


@pytest.mark.ledger("B07")
def test_unknown_characters_raise_or_map_or_go():
    with pytest.raises(ValueError, match=r"'q' is not in the tokenizer's vocabulary"):
        char_tokenizer("abc").encode("aqc")
    mapped = char_tokenizer("abc", "unk")
    assert mapped.encode("aqc") == [4, 3, 6] and mapped.decode([4, 3, 6]) == "a\ufffdc"
    # Ids of a model's padded vocabulary, which no symbol has.
    assert mapped.decode([4, mapped.vocab_size, 6, 999]) == "a\ufffdc\ufffd"
    dropped = char_tokenizer("abc", "drop")
    assert dropped.encode("aqc") == [3, 5]
    with pytest.raises(ValueError, match="unknown should be one of"):
        char_tokenizer("abc", "ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="should differ"):
        char_tokenizer("aa")


@pytest.mark.ledger("B07")
def test_trained_characters_are_stable(lines, tmp_path):
    trained = train_chars(lines)
    assert trained == train_chars(reversed(lines)) == train_chars(set(lines))
    assert trained.symbols[:3] == ("<pad>", "<bos>", "<eos>")
    assert list(trained.symbols[3:]) == sorted(set("".join(lines)))
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    trained.save(tmp_path)
    assert load_tokenizer(tmp_path) == trained == load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.ledger("B08")
def test_teeny_gpt_has_29_symbols(tmp_path):
    t = teeny_gpt_tokenizer()
    assert t.vocab_size == 29 and t.bos_id == 29 - 1 and t.pad_id == t.eos_id == 0
    assert t.row("ab c") == [28, 1, 2, 27, 3] + [0] * 145
    assert t.encode("abcdefghijklmnopqrstuvwxyz ") == [*range(1, 27), 27]
    assert t.row("z" * 200) == [28] + [26] * 149
    assert t.decode([28, 1, 2, 0, 3, 4]) == "ab" and t.decode([0, 5]) == ""
    assert t.encode("Élan, naïve: í 9!") == t.encode("elan naive i ")
    assert t.decode(t.encode("ÀÉÍÕÜÇñ")) == "aeioucn"
    t.save(tmp_path)
    assert load_tokenizer(tmp_path) == t


@pytest.mark.ledger("B08")
@given(st.text("abcdefghijklmnopqrstuvwxyz ", max_size=149))
def test_teeny_gpt_round_trip(text):
    assert (t := teeny_gpt_tokenizer()).decode(t.row(text)) == text


@pytest.mark.ledger("L21")
def test_splits_equal_gpt2s_published_pattern(bpe):
    regex = pytest.importorskip("regex")
    rng, symbols = random.Random(0), byte_symbols()
    for size in [0, 1, 2, 5] * 50 + [300] * 100:
        text = random_unicode(rng, size)
        want = ["".join(symbols[b] for b in p.encode()) for p in regex.findall(GPT2_PATTERN, text)]
        assert [p for p, _ in bpe.library.pre_tokenizer.pre_tokenize_str(text)] == want


def brute_force_merges(words, symbols, num_merges):
    """Byte-pair encoding by its definition: recount every pair, merge the most frequent, repeat.

    Of equally frequent pairs the one with the smallest ids is merged, as the library documents.
    """
    ids = {symbol: n for n, symbol in enumerate(sorted(symbols.values()))}
    counts = collections.Counter(tuple(symbols[b] for b in word.encode()) for word in words)
    merges = []
    for _ in range(num_merges):
        pairs = collections.Counter()
        for word, count in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        merged = collections.Counter()
        for word, count in counts.items():
            new, n = [], 0
            while n < len(word):
                step = 2 if word[n : n + 2] == best else 1
                new.append("".join(word[n : n + step]))
                n += step
            merged[tuple(new)] += count
        counts = merged
    return merges


@pytest.mark.ledger("L21")
def test_merges_equal_a_brute_force_trainer(lines):
    regex = pytest.importorskip("regex")
    text = lines[:400]
    words = [word for line in text for word in regex.findall(GPT2_PATTERN, line)]
    want = brute_force_merges(words, byte_symbols(), 250)
    model = json.loads(train_bpe(text, 257 + 250).library.to_str())["model"]
    assert [tuple(merge) for merge in model["merges"]] == want


@pytest.mark.ledger("L21")
def test_no_merge_joins_letters_with_punctuation(lines):
    rng = random.Random(1)
    mixed = ["".join(rng.choices("ab.,-'# 12", k=60)) for _ in range(300)]
    tokens = train_bpe([*lines, *mixed], 3000).library.get_vocab()
    back = {symbol: byte for byte, symbol in byte_symbols().items()}
    allowed = ("'s", "'t", "'re", "'r", "'ve", "'v", "'m", "'ll", "'l", "'d")  # The pattern's own.
    assert "." in tokens and len(tokens) > 2000
    for token in tokens.keys() - {"<|endoftext|>"}:
        text = bytes(back[c] for c in token).decode(errors="ignore").strip()
        kinds = {unicodedata.category(c)[0] for c in text}
        assert text in allowed or not ("L" in kinds and kinds - {"L", "M"}), token
        assert not ("N" in kinds and kinds - {"N", "M"}), token


@pytest.mark.ledger("L21")
def test_all_bytes_round_trip(bpe):
    rng = random.Random(2)
    used = set()
    low = "".join(map(chr, range(0x800))) + "\U00040000\U00080000\U000c0000"
    for text in [low, *(random_unicode(rng, 200) for _ in range(200))]:
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        used.update(text.encode())
    assert len(used) == 256 - 13  # C0, C1 and F5..FF never occur in UTF-8.
    alphabet = set(byte_symbols().values())
    assert alphabet <= set(bpe.library.get_vocab())


@given(st.text())
def test_bpe_is_lossless(text):
    bpe = train_bpe(["a small corpus, it's a corpus"], 280)
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode_batch([text, "x"]) == [bpe.encode(text), bpe.encode("x")]


def test_special_tokens_in_text_are_text(bpe):
    text = "an <|endoftext|> in the text"
    assert bpe.decode(bpe.encode(text)) == text and bpe.eos_id not in bpe.encode(text)
    assert bpe.encode(text, special=True).count(bpe.eos_id) == 1
    assert bpe.vocab_size == 1500


def test_bpe_vocabulary_holds_the_bytes():
    with pytest.raises(ValueError, match="at least 257 tokens, not 256"):
        train_bpe(["x"], 256)


def test_wordpiece(lines, tmp_path):
    t = train_wordpiece(lines, 800)
    assert (t.pad_id, t.bos_id, t.eos_id) == (0, 2, 3) and t.vocab_size == 800
    assert t.decode(t.encode("Ebola in Liberia")) == "ebola in liberia"
    assert t.encode("[MASK]", special=True) == [4] and 4 not in t.encode("[MASK]")
    t.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(lines[0]) == t.encode(lines[0])


def test_library_tokenizers_open_in_transformers(bpe, lines, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 0)
    for line in lines[:200]:
        assert theirs(line)["input_ids"] == bpe.encode(line)
        assert theirs.decode(bpe.encode(line)) == line
    ours = load_tokenizer(tmp_path)
    assert (ours.pad_id, ours.bos_id, ours.eos_id) == (0, 0, 0)


def test_special_tokens_come_from_the_hugging_face_configuration(tmp_path, bpe):
    bpe.save(tmp_path)
    config = {"bos_token": None, "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert (ours.pad_id, ours.bos_id, ours.eos_id) == (None, None, 0)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="'</s>' is not in the tokenizer's vocabulary"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no tokenizer at"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]", '{"format": "lm.char.v1"}', '{"model": {"type": "Odd"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="is no tokenizer that can be read"):
            load_tokenizer(tmp_path)


def test_all_answer_the_protocol(bpe):
    assert isinstance(bpe, Tokenizer) and isinstance(teeny_gpt_tokenizer(), Tokenizer)
    assert isinstance(bpe, SubwordTokenizer) and isinstance(char_tokenizer("a"), CharTokenizer)


def test_the_start_and_the_chat_template_are_saved(tmp_path, bpe):
    changed = dataclasses.replace(bpe, starts=False, chat_template="{{ messages }}")
    changed.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.starts, again.chat_template) == (False, "{{ messages }}")
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    (tmp_path / "chat_template.jinja").unlink()
    again = load_tokenizer(tmp_path)
    assert (again.starts, again.chat_template) == (True, "b")
