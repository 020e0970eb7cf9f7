"""GGUF files read as transformers reads them, tensor by tensor; nothing unknown is passed by."""

import json
from itertools import pairwise

import gguf
import jax
import numpy as np
import pytest
import regex
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

import lm
from lm.core.paths import flatten
from lm.interop.gguf import LLAMA3_WORDS, Interleaved, Metadata, read_tokenizer
from lm.models.foreign import write_weights
from lm.models.zoo import get_family
from tests.interop import tiny_gguf
from tests.parity.hf import ids, right_padded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

KINDS = [
    *(Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1),
    *tiny_gguf.SCALES,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits_equal_those_of_transformers(kind, tmp_path):
    tied = kind in (Kind.F32, Kind.Q4_1)
    tiny_gguf.write(tmp_path / "tiny.gguf", kind, tied=tied)
    loaded = lm.load(tmp_path / "tiny.gguf")
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    ).eval()
    assert module.config.tie_word_embeddings == tied
    tokens, mask = ids(300), right_padded()
    with torch.no_grad():
        theirs = module(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)
        ).logits
    ours = np.asarray(loaded.logits(tokens, mask=mask))
    assert np.abs(ours).max() > 0.5
    assert np.abs((ours - theirs.numpy())[mask == 1]).max() <= 1e-4
    exported = write_weights(get_family("llama").weights(loaded.model), loaded.params)
    state = module.state_dict()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)


def test_rotary_pairs_are_put_apart_and_together_again():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(6 * 8, 5)).astype(np.float32)
    (kernel,) = Interleaved().read(array, [(5, 6, 8)])
    np.testing.assert_array_equal(Interleaved().write([kernel]), array)
    for head in range(6):  # Row 2i of a head is its place i, row 2i + 1 its place 4 + i.
        np.testing.assert_array_equal(kernel[:, head, :4].T, array[head * 8 : head * 8 + 8 : 2])
        np.testing.assert_array_equal(kernel[:, head, 4:].T, array[head * 8 + 1 : head * 8 + 8 : 2])


TEXTS = [
    "Hello world", "  two  spaces ", "It's the mayor's 15,000 votes; don't they're I'LL",
    "a  5 and 12345.678", "Zürich, naïve café — “quoted” ½ ٣٤", "日本語 한국어 🙂👍🏽",
    "\n\n\t tabs\r\n",     "x=1;\n    return  x", "", " ", "e\u0301 \u00a0 \u200b",
    "<|endoftext|> spelled out", "ABC123abc 1 22 333 4444",
]  # fmt: skip
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {"gpt-2": [GPT2_WORDS], "smollm": [r"\p{N}", GPT2_WORDS], "llama-bpe": [LLAMA3_WORDS]}


def brute_force(text: str, patterns, vocabulary, merges, whole_words: bool) -> list[int]:
    """Byte-pair encoding by its definition: the pair of the lowest rank first, in every piece."""
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in split(pattern, piece)]
    alphabet = byte_alphabet()
    found = []
    for piece in pieces:
        parts = [alphabet[byte] for byte in piece.encode()]
        if whole_words and "".join(parts) in vocabulary:
            parts = ["".join(parts)]
        while known := [(merges[p], i) for i, p in enumerate(pairwise(parts)) if p in merges]:
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [vocabulary[part] for part in parts]
    return found


def split(pattern: str, text: str) -> list[str]:
    """Cuts out every match; what lies between matches is a piece too."""
    parts, end = [], 0
    for match in regex.finditer(pattern, text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in [*parts, text[end:]] if part]


def byte_alphabet() -> dict[int, str]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    alphabet = {byte: chr(byte) for byte in kept}
    alphabet |= {byte: chr(256 + n) for n, byte in enumerate(rest)}
    assert sorted(alphabet.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


@pytest.mark.parametrize("pre", PATTERNS)
def test_tokens_are_those_of_the_definition(pre, tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf", pre=pre)
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = read_tokenizer(Metadata(values, tmp_path))
    vocabulary = {t: i for i, t in enumerate(values["tokenizer.ggml.tokens"])}
    merges = {tuple(p.split(" ")): i for i, p in enumerate(values["tokenizer.ggml.merges"])}
    for text in [*TEXTS, tiny_gguf.TEXT]:
        expected = brute_force(text, PATTERNS[pre], vocabulary, merges, pre == "llama-bpe")
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("<|endoftext|>a", special=True)[0] == 0 == tokenizer.bos_id


def test_tokenizer_equals_that_of_transformers(tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf")
    ours = lm.load(tmp_path / "tiny.gguf").tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in [*TEXTS, tiny_gguf.TEXT]:
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=True) == expected, text
    messages = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "<b>"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(change={"general.architecture": "mamba"}), "'mamba'; 'llama' is implemented"),
        (dict(change={"llama.attention.scale": 0.5}), r"llama\.attention\.scale='0\.5'"),
        (dict(change={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type' is 'yarn'"),
        (dict(change={"llama.rope.dimension_count": 32}), "dimension_count' is 32"),
        (dict(change={"llama.expert_count": 8}), "expert_count' is 8"),
        (dict(change={"llama.feed_forward_length": [256, 256]}), "differs by layer"),
        (dict(change={"split.count": 3}), "split.count' is 3"),
        (dict(change={"tokenizer.ggml.model": "llama"}), "model' is 'llama'; only 'gpt2'"),
        (dict(change={"tokenizer.ggml.pre": "tekken"}), "pre' is 'tekken'"),
        (dict(change={"tokenizer.ggml.eos_token_id": 999}), "outside the vocabulary"),
        (dict(change={"tokenizer.ggml.merges": ["no such"]}), "no tokenizer that can be read"),
        (dict(change={"llama.feed_forward_length": 128}), "has shape"),
        (dict(drop=["llama.block_count"]), "lacks the metadata key 'llama.block_count'"),
        (dict(drop=["blk.1.ffn_up.weight"]), "missing: blk.1.ffn_up.weight"),
        (dict(more={"rope_freqs.weight": np.ones(8, np.float32)}), "maps: rope_freqs.weight"),
        (dict(more={"blk.0.attn_q.bias": np.ones(256, np.float32)}), "maps: blk.0.attn_q.bias"),
    ],
    ids=str,
)
def test_what_nobody_maps_is_named(options, message, tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf", **options)
    with pytest.raises(ValueError, match=message):
        lm.load(tmp_path / "tiny.gguf")


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    whole = path.read_bytes()
    for length in [0, 3, 4, 10, 30, 500, 5000, 12000, len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tiny\.gguf is no whole GGUF file"):
            lm.load(path)
    path.write_bytes(b"safetensors are something else")
    with pytest.raises(ValueError, match="is no whole GGUF file"):
        lm.load(path)
    with pytest.raises(ValueError, match="there is no"):
        lm.load(tmp_path / "none.gguf")


def test_tensor_types_without_a_dequantizer_are_named(tmp_path):
    tiny_gguf.write(
        tmp_path / "tiny.gguf", more={"output.weight": np.ones((300, 256), np.int32)}, tied=True
    )
    with pytest.raises(ValueError, match=r"output\.weight is stored as I32"):
        lm.load(tmp_path / "tiny.gguf")


def test_a_loaded_file_is_used_like_any_model(tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf")
    loaded = lm.load(tmp_path / "tiny.gguf", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert len(flatten(loaded.params)) == 12 and loaded.name.endswith("tiny.gguf")
    assert json.loads(loaded.tokenizer.library.to_str())["decoder"]["type"] == "ByteLevel"
