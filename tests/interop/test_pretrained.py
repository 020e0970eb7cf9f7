"""Models that pinned packages carry compute what transformers computes with the same weights."""

import gguf
import numpy as np
import pytest
import regex

import lm
from lm.data.instructions import InstructionData
from lm.infer.generate import generate_tokens
from lm.interop import named
from tests.interop.test_gguf import PATTERNS, TEXTS, brute_force

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
SMOLLM2, MINILM = "package:smollm2-135m-instruct", "package:all-minilm-l6-v2"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "In 1969, the first humans",
    "Die Hauptstadt von Deutschland ist",
    "1, 2, 3, 4,",
    "The quick brown fox",
    "To make bread, you need",
    "Photosynthesis is the process by which",
    "import numpy as np\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    "The largest planet in the solar system",
    "Dear Sir or Madam,",
    "Q: How many legs has a spider?\nA:",
    "日本の首都は",
    "The stock market fell today because",
    "| name | age |\n|---|---|\n",
    "x",
]
MESSAGES = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Sure? <b>&amp;</b> é"},
]


@pytest.fixture(scope="module")
def ours():
    return lm.load(SMOLLM2)


@pytest.fixture(scope="module")
def where():
    path = named.locate(SMOLLM2)
    return dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def theirs(where):
    return transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def padded(ours):
    """The prompts as one batch, padded on the left: ids and mask."""
    rows = [ours.tokenizer.encode(text, special=True) for text in PROMPTS]
    width = max(map(len, rows))
    tokens = np.array([[2] * (width - len(row)) + row for row in rows])
    return rows, tokens, np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def test_smollm2_logits(ours, theirs, padded):
    _, tokens, mask = padded
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits
    found = np.asarray(ours.logits(tokens, mask=mask))
    assert found.shape == (20, tokens.shape[1], 49152)
    assert np.abs((found - expected.numpy())[mask == 1]).max() <= 1e-3


def test_smollm2_greedy_continuations(ours, theirs, padded):
    rows, tokens, mask = padded
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask),
        do_sample=False,
        max_new_tokens=64,
        pad_token_id=2,
    )[:, tokens.shape[1] :]
    found = generate_tokens(ours.model, ours.params, rows, max_new_tokens=64, temperature=0)
    np.testing.assert_array_equal(found.tokens, expected.numpy())


def test_smollm2_tokens_and_chat(ours, where):
    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    metadata = gguf.GGUFReader(named.locate(SMOLLM2)).fields
    vocabulary = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"].contents())}
    merges = metadata["tokenizer.ggml.merges"].contents()
    merges = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}
    for text in [*TEXTS, *PROMPTS]:
        expected = brute_force(text, PATTERNS["smollm"], vocabulary, merges, False)
        assert ours.tokenizer.encode(text) == expected, text
        # transformers does not read which pre-tokenizer a GGUF file names, and takes GPT-2's. It
        # cuts white space before digits in another place, and does not part other numerals.
        if not regex.search(r"\s\s\p{N}|[^\P{N}0-9]", text):
            found = ours.tokenizer.encode(text, special=True)
            assert found == theirs(text).input_ids, text
        assert ours.tokenizer.decode(expected) == text
    for start_reply in (False, True):
        assert ours.tokenizer.apply_chat_template(MESSAGES, start_reply) == (
            theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=start_reply)
        )
    assert ours.tokenizer.eos_id == theirs.eos_token_id == 2


def test_smollm2_trains_on_replies(ours):
    """The tokens that train are each reply and the end of its turn; the ids are those of a chat."""
    data = InstructionData("glaive_toolcall_en_demo", length=4096).make(ours.tokenizer)
    talks = data.conversations["train"][:40]
    assert max(sum(m["role"] == "assistant" for m in talk) for talk in talks) >= 4
    for talk in [*talks, *InstructionData().make(ours.tokenizer).conversations["validation"]]:
        ids, numbers = ours.tokenizer.encode_replies(talk)
        text = ours.tokenizer.apply_chat_template(talk)
        assert ids == ours.tokenizer.encode(text, special=True)
        for number, message in enumerate((m for m in talk if m["role"] == "assistant"), 1):
            reply = [token for token, found in zip(ids, numbers) if found == number]
            assert ours.tokenizer.decode(reply, special=True) == message["content"] + "<|im_end|>"
    assert ours.tokenizer.end_of_turn == ours.tokenizer.eos_id == 2


def test_smollm2_is_given_no_token_that_it_does_not_expect(ours):
    text = lm.generate(ours, ["The capital of France is"], max_new_tokens=2, temperature=0)
    assert text == [" Paris."]


def test_smollm2_goes_out_again(ours, tmp_path):
    lm.import_model(SMOLLM2, tmp_path / "run")
    out = lm.export_model(tmp_path / "run", tmp_path / "out")
    module = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in [*TEXTS, *PROMPTS]:
        expected = ours.tokenizer.encode(text, special=True)
        assert tokenizer(text).input_ids == expected, text
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == (
        ours.tokenizer.apply_chat_template(MESSAGES)
    )
    tokens = np.array([ours.tokenizer.encode(PROMPTS[4], special=True)])
    with torch.no_grad():
        expected = module(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(np.asarray(ours.logits(tokens)) - expected).max() <= 1e-3


def test_minilm_embeddings():
    path, texts = named.locate(MINILM), [*TEXTS, *PROMPTS]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    module = transformers.AutoModel.from_pretrained(path).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = module(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None]
    expected = (hidden * kept).sum(1) / kept.sum(1)
    loaded = lm.load(MINILM)
    found = lm.embed(loaded, texts)
    assert np.abs(found - expected.numpy()).max() <= 1e-5
