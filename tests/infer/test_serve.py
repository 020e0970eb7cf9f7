"""Continuous batching: each prompt's text is that which it has alone."""

from types import SimpleNamespace

import jax
import pytest

from lm.infer.generate import generate, generate_tokens
from lm.infer.serve import Batcher, generate_many
from lm.models import adapters
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.families.teeny_gpt import teeny_gpt
from lm.models.zoo import get_family
from tests.conformance.harness import tiny
from tests.infer.test_generate import rows_of
from tests.infer.test_text import Numbers
from tests.models.test_adapters import adapted

LENGTHS = (3, 18, 1, 7, 20, 2, 9, 4, 1, 12)
LIMITS = (12, 5, 9, 1, 12, 12, 3, 12, 7, 10)
SETTINGS = dict(temperature=1.4, top_k=30, top_p=0.97, repetition_penalty=1.1)


def submitted(batcher, rows, keys, **options):
    for index, (row, limit) in enumerate(zip(rows, LIMITS)):
        assert batcher.submit(row, max_new_tokens=limit, key=keys[index], **options) == index


def model_of(name):
    """A tiny model and its parameters; 'mistral' is the llama with a window."""
    model, params = tiny("llama" if name == "mistral" else name)
    if name == "mistral":
        family = get_family("llama")
        model = family.build(**{**family.tiny, "window": 6})
    return model, params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gpt2", "mamba"])
def test_equals_each_prompt_alone(name):
    """Three rows, ten prompts of different lengths and limits, in caches that go round."""
    model, params = model_of(name)
    rows = rows_of(LENGTHS, model.vocab_size)
    keys = jax.random.split(jax.random.key(4), len(rows))
    options = dict(max_new_tokens=max(LIMITS), keys=keys, **SETTINGS)
    whole = generate_tokens(model, params, rows, **options).rows()
    stop = whole[0][4]
    lengths = dict(prompt_length=20, max_new_tokens=12)
    batcher = Batcher(model, params, slots=3, stop_ids=[stop], chunk=4, **lengths)
    first = int(batcher.decoding.state["slot"])
    submitted(batcher, rows, keys, **SETTINGS)
    found = {finished.index: finished for finished in batcher.run()}
    assert sorted(found) == list(range(len(rows)))
    slots = batcher.decoding.state["segments"].shape[1]
    assert int(batcher.decoding.state["slot"]) - first > slots - first, "the cache did not go round"
    for index, row in enumerate(whole):
        expected = row[: LIMITS[index]]
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert found[index].tokens == expected, index
        assert found[index].waited >= 0 and 0 < found[index].first_token <= found[index].seconds
    assert len(found[0].tokens) == 5
    assert list(batcher.run()) == []


@pytest.mark.slow
def test_texts_come_as_they_are_finished(compilations):
    """The texts of `generate`, settings by prompt; short ones overtake long ones."""
    model, params = model_of("gpt2")
    loaded = SimpleNamespace(model=model, params=params, tokenizer=Numbers())
    prompts = [" ".join(map(str, row)) for row in rows_of((3, 18, 1, 7, 5), model.vocab_size)]
    temperatures = [0.0, 0.7, 1.0, 1.3, 2.0]
    options = dict(max_new_tokens=9, temperature=temperatures, seed=3)
    expected = generate(loaded, prompts, **options)
    found = list(generate_many(loaded, prompts, slots=2, chunk=3, **options))
    assert [finished.index for finished in found] != [0, 1, 2, 3, 4] or len(set(expected)) == 5
    assert [finished.text for finished in sorted(found)] == expected
    with compilations() as compiled:
        again = list(generate_many(loaded, prompts, slots=2, chunk=3, **{**options, "seed": 4}))
    assert compiled == [] and [one.text for one in sorted(again)] != expected


def test_compilations_are_bounded(compilations):
    """One program for the loop, one for each bucket of lengths, one for what is there at first."""
    model = teeny_gpt(max_length=64, num_layers=1, mlp_multiplier=1)
    params = P.init(model, jax.random.key(0))
    # The keys' program, and that which lays the parameters apart.
    generate_tokens(model, params, [[1]], max_new_tokens=1)
    with compilations() as compiled:
        batcher = Batcher(model, params, slots=2, prompt_length=40, max_new_tokens=10)
        for length in range(1, 41, 3):
            batcher.submit([1] * length, max_new_tokens=1 + length % 9, temperature=length % 2)
        assert len(list(batcher.run())) == 14
    assert len(compiled) == 2 + 4  # Prompts are 16, 24, 32 and 48 wide.


def test_more_may_be_submitted_meanwhile():
    model, params = model_of("gpt2")
    batcher = Batcher(model, params, slots=2, prompt_length=4, max_new_tokens=6, chunk=2)
    batcher.submit([3, 4])
    found = []
    for finished in batcher.run():
        found.append(finished.index)
        if finished.index < 3:
            batcher.submit([finished.index + 5], max_new_tokens=2)
    assert found == [0, 1, 2, 3]


@pytest.mark.slow
def test_each_prompt_has_its_adapter():
    model, params = model_of("gpt2")
    one, two = (adapted(model, params, LoRA(2, targets=("*/out/kernel",)), n) for n in (1, 2))
    several = adapters.stack(params, [adapters.split(each)[1] for each in (one, two)])
    loaded = SimpleNamespace(model=model, params=several, tokenizer=Numbers())
    prompts, choices = ["3 4 5", "3 4 5", "3 4 5", "7"], [1, -1, 0, 0]
    options = dict(max_new_tokens=8, temperature=0, adapters=choices)
    expected = generate(loaded, prompts, **options)
    assert len(set(expected)) == 4
    found = sorted(generate_many(loaded, prompts, slots=2, **options))
    assert [finished.text for finished in found] == expected


def test_bad_input_gets_a_clear_sentence():
    model, params = model_of("gpt2")
    sizes = dict(slots=2, prompt_length=4, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"use lm\.generate"):
        Batcher(get_family("t5").build(**get_family("t5").tiny), {}, **sizes)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Batcher(model, params, **{**sizes, "slots": 0})
    with pytest.raises(ValueError, match="cache_dtype is one of float32, bfloat16, int8"):
        Batcher(model, params, cache_dtype="int4", **sizes)
    batcher = Batcher(model, params, **sizes)
    for match, prompt, options in [
        ("5 tokens, and these rows have room for 4", [1] * 5, {}),
        ("from 1 to 6, .* not 7", [1], dict(max_new_tokens=7)),
        ("token id -1", [-1], {}),
        ("temperature must be", [1], dict(temperature=-1.0)),
        ("among several adapters", [1], dict(adapter=0)),
    ]:
        with pytest.raises(ValueError, match=match):
            batcher.submit(prompt, **options)
    assert list(batcher.run()) == []
