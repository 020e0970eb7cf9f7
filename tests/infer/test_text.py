"""Text in, text out: what `generate`, `stream`, `score` and `embed` make of a loaded model."""

import random
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.data.tokenizer import teeny_gpt_tokenizer, train_bpe
from lm.infer import score as scoring
from lm.infer.generate import generate, generate_tokens, pieces, stream
from lm.infer.score import embed, score
from lm.models import params
from lm.models.families.teeny_gpt import teeny_gpt
from tests.conformance.harness import forward, random_tokens, tiny, with_source
from tests.data.chats import chat_tokenizer

TEXTS = ["a", "the cat sat", "on the mat with another cat", "zz"]


class Numbers:
    """Texts are numbers with spaces between; any vocabulary will do."""

    pad_id = bos_id = 0
    eos_id = 1

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


class NoStart(Numbers):
    bos_id = eos_id = None


@pytest.fixture(scope="module")
def loaded():
    model, params = tiny("teeny_gpt")
    return SimpleNamespace(model=model, params=params, tokenizer=teeny_gpt_tokenizer())


@pytest.fixture(scope="module")
def bpe():
    letters = "añe漢🙂👩‍👩‍👧 ." * 3
    rng = random.Random(0)
    texts = ["".join(rng.choices(letters, k=40)) for _ in range(50)]
    return train_bpe(texts, 300)


def test_generate_continues_after_the_start_token_and_stops_at_the_end(loaded):
    tokenizer = loaded.tokenizer
    ours = generate(loaded, TEXTS, max_new_tokens=30, seed=3, temperature=1.2)
    rows = generate_tokens(
        loaded.model, loaded.params, [[tokenizer.bos_id, *tokenizer.encode(t)] for t in TEXTS],
        max_new_tokens=30, seed=3, temperature=1.2, stop_ids=[tokenizer.eos_id],
    ).rows()  # fmt: skip
    assert ours == [tokenizer.decode(row) for row in rows]
    assert any(row[-1] == tokenizer.eos_id for row in rows)
    assert generate(loaded, "the", max_new_tokens=5) == generate(loaded, ["the"], max_new_tokens=5)
    # A further stop token is no part of the text.
    stop = tokenizer.encode(max(ours, key=len)[2])[0]
    cut = generate(loaded, TEXTS, max_new_tokens=30, seed=3, temperature=1.2, stop_ids=[stop])
    assert cut == [text.split(tokenizer.decode([stop]))[0] for text in ours] != ours


def test_stream_is_generate_in_pieces(loaded):
    options = dict(max_new_tokens=30, seed=4, temperature=1.1)
    streamed = list(stream(loaded, "the", **options))
    assert len(streamed) > 3
    assert "".join(streamed) == generate(loaded, "the", **options)[0]


def test_an_encoder_decoder_reads_prompts_as_sources(each):
    if not each.has_encoder:
        pytest.skip("a decoder has no source")
    it = SimpleNamespace(model=each.model, params=each.params, tokenizer=Numbers())
    options = dict(max_new_tokens=8, seed=4)
    texts = ["5 6 7", "8 9"]
    ours = generate(it, texts, **options)
    rows = generate_tokens(
        each.model, each.params, source=[[5, 6, 7, 1], [8, 9, 1]], stop_ids=[1], **options
    ).rows()
    assert ours == [Numbers().decode([i for i in row if i != 1]) for row in rows]
    assert "".join(stream(it, texts[0], **options)) == ours[0]


def test_pieces_are_whole_characters(bpe):
    rng = np.random.default_rng(0)
    for trial in range(50):
        if trial % 2:
            ids = rng.integers(1, bpe.vocab_size, 30).tolist()  # Mostly broken UTF-8.
        else:
            ids = bpe.encode("漢🙂ñ 👩‍👩‍👧. é𝄞 ¿")
        out = list(pieces(bpe, iter(ids)))
        assert "".join(out) == bpe.decode(ids)
        if trial % 2 == 0:
            assert len(out) > 5 and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in out)


def test_pieces_come_as_soon_as_they_can(bpe):
    seen = []

    def tokens():
        for token in bpe.encode("a. 🙂a."):
            yield token
            seen.append("".join(got))

    got = []
    for piece in pieces(bpe, tokens()):
        got.append(piece)
    assert seen[0] == "a"
    assert all("a. 🙂a.".startswith(text) for text in seen)
    assert seen[-1] == "a. 🙂a."


def loop_score(model, params, ids, first, ctx=Context()):
    """Sum of ln p of the tokens from number `first` on, one forward each, in float64."""
    total = 0.0
    for place in range(first, len(ids)):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, :place] = ids[:place]
        logits = np.asarray(forward(model, params, tokens, ctx)[0][0, place - 1], np.float64)
        total += logits[ids[place]] - np.log(np.exp(logits).sum())
    return total


def test_score_equals_a_loop(loaded):
    tokenizer = loaded.tokenizer
    for text, ours in zip(TEXTS, score(loaded, TEXTS, batch_size=2)):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        expected = loop_score(loaded.model, loaded.params, ids, 1)
        assert ours.sum == pytest.approx(expected, rel=1e-5)
        assert ours.tokens == len(text) and ours.per_token == pytest.approx(expected / len(text))
    pairs = [("the cat", " sat"), ("", "mat")]
    for (context, text), ours in zip(pairs, score(loaded, pairs)):
        ids = [tokenizer.bos_id, *tokenizer.encode(context + text)]
        expected = loop_score(loaded.model, loaded.params, ids, 1 + len(context))
        assert ours.sum == pytest.approx(expected, rel=1e-5) and ours.tokens == len(text)


def test_score_without_a_start_token_begins_at_the_second(loaded):
    it = SimpleNamespace(model=loaded.model, params=loaded.params, tokenizer=NoStart())
    (ours,) = score(it, ["5 6 7"])
    assert ours.tokens == 2
    assert ours.sum == pytest.approx(loop_score(it.model, it.params, [5, 6, 7], 1), rel=1e-5)


def test_score_of_an_encoder_decoder(each):
    if not each.has_encoder:
        pytest.skip("a decoder has no source")
    it = SimpleNamespace(model=each.model, params=each.params, tokenizer=Numbers())
    with pytest.raises(ValueError, match="pairs"):
        score(it, ["5 6"])
    pairs = [("5 6 7", "8 9 10 11"), ("8", "4")]
    for (source, target), ours in zip(pairs, score(it, pairs)):
        ctx = Context(source_BS=jnp.asarray([[*map(int, source.split()), 1]]))
        ids = [each.model.start_id, *map(int, target.split())]
        expected = loop_score(each.model, each.params, ids, 1, ctx)
        assert ours.sum == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_predict_in_chunks_equals_at_once(each, monkeypatch):
    tokens = random_tokens(each.model, (2, 11))
    targets = random_tokens(each.model, (2, 11), seed=1)
    ctx = with_source(each.model, Context(), tokens)
    once = scoring.predict(each.model, each.params, tokens, targets, ctx)
    monkeypatch.setattr(scoring, "CHUNK", 4)
    chunked = jax.jit(scoring.predict, static_argnums=0)(
        each.model, each.params, tokens, targets, ctx
    )
    np.testing.assert_allclose(chunked[0], once[0], atol=1e-5)
    np.testing.assert_array_equal(chunked[1], once[1])


def test_embed_is_the_mean_of_the_hidden_states(loaded):
    vectors = embed(loaded, TEXTS, batch_size=3)
    assert vectors.shape == (4, loaded.model.embed.features) and vectors.dtype == np.float32
    apply = jax.jit(loaded.model.apply, static_argnames="method")
    for text, vector in zip(TEXTS, vectors):
        ids = [28, *loaded.tokenizer.encode(text)]
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(ids)] = ids
        hidden, _ = apply({"params": loaded.params}, tokens, method="hidden")
        np.testing.assert_allclose(vector, hidden[0, : len(ids)].mean(0), atol=1e-5)


def test_bad_input_gets_a_clear_sentence(loaded):
    limit = loaded.model.max_length
    for function in (score, embed):
        with pytest.raises(ValueError, match=f"text 1 has {limit + 1} tokens.*shorten the text"):
            function(loaded, ["a", "b" * limit])
        with pytest.raises(ValueError, match="there is no text"):
            function(loaded, [])
    with pytest.raises(ValueError, match="text 1 has no token to predict"):
        score(loaded, [("a", "b"), ("a", "")])
    with pytest.raises(ValueError, match="bidirectional"):
        score(SimpleNamespace(model=SimpleNamespace(causal=False), tokenizer=None), ["a"])
    bare = SimpleNamespace(model=loaded.model, params=loaded.params, tokenizer=NoStart())
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(bare, "", max_new_tokens=3)


def test_scoring_many_lengths_needs_few_programs(loaded, compilations):
    texts = ["a" * n for n in range(1, 60)]
    with compilations() as compiled:
        score(loaded, texts, batch_size=8)
    assert 0 < len(compiled) <= 6


def test_conversations_continue_with_a_reply():
    """It is read as the template writes it, special tokens as such; the end of a turn stops it."""
    tokenizer = chat_tokenizer()
    model = teeny_gpt(tokenizer.vocab_size, 64, 16, 2, 2, 2)
    loaded = SimpleNamespace(
        model=model, params=params.init(model, jax.random.key(0)), tokenizer=tokenizer
    )
    talk = [{"role": "user", "content": "What is gravity?"}]
    prompt = "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt, special=True)
    assert tokenizer.encode_chat(talk) == ids and tokenizer.specials["<|im_start|>"] in ids
    stop = tokenizer.end_of_turn
    assert stop == tokenizer.specials["<|im_end|>"]
    options = dict(max_new_tokens=20, temperature=3.0, seed=4)
    rows = generate_tokens(loaded.model, loaded.params, [ids], stop_ids=[stop], **options).rows()
    assert generate(loaded, [talk], **options) == [tokenizer.decode(rows[0])]
    assert "".join(stream(loaded, talk, **options)) == tokenizer.decode(rows[0])
    # Another end of text does not hinder the end of a turn.
    other = SimpleNamespace(
        model=model, params=loaded.params, tokenizer=replace(tokenizer, eos="<|endoftext|>")
    )
    assert other.tokenizer.end_of_turn == stop
    assert generate(other, [talk], **options) == generate(loaded, [talk], **options)
    with pytest.raises(ValueError, match="no chat template"):
        plain = SimpleNamespace(
            model=model, params=loaded.params, tokenizer=replace(tokenizer, chat_template=None)
        )
        generate(plain, [talk], **options)


def test_characters_do_not_chat(loaded):
    with pytest.raises(ValueError, match="no chat template"):
        generate(loaded, [[{"role": "user", "content": "a"}]], max_new_tokens=4)
