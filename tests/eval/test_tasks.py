"""Benchmarks: what is asked, how answers count, and what is said of bad input."""

import builtins
import dataclasses
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest

from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.eval.requests import BETWEEN, PACKAGE, TASKS, Item, check_request, load_items
from lm.eval.tasks import line_of, run_tasks, summarize, write_evaluation
from lm.infer.score import Likelihood, loglikelihood
from lm.interop.loaded import Loaded
from tests.conformance.harness import FAMILIES, random_params
from tests.eval import toy_package
from tests.eval.toy_package import EXAMPLES, QUESTIONS, WORDS

COUNTS = dict(
    lambada=5153, hellaswag=10042, arc_easy=2376, arc_challenge=1172, piqa=1838, winogrande=1267,
    boolq=3270, sciq=1000, sst2=872, copa=100,
)  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    toy_package.install(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def loaded():
    model = FAMILIES["teeny_gpt"].build(**{**FAMILIES["teeny_gpt"].tiny, "num_layers": 1})
    return Loaded(model, random_params(model), teeny_gpt_tokenizer(), name="tiny")


def test_items_are_the_requests_of_one_question(package):
    items = load_items("hellaswag")
    assert [item.gold for item in items] == [gold for _, _, gold in QUESTIONS]
    for item, (question, choices, _) in zip(items, QUESTIONS):
        assert item.pairs == tuple((question, choice) for choice in choices)
    assert load_items("hellaswag", limit=2) == items[:2]
    assert load_items("lambada") == [Item((pair,), 0) for pair in WORDS]


@pytest.mark.parametrize("name", ["hellaswag", "arc_easy"])
@pytest.mark.parametrize("shots", range(6))
def test_examples_stand_before_the_question(package, name, shots):
    start = "".join(example + BETWEEN for example in EXAMPLES[:shots])
    for item, (question, choices, _) in zip(load_items(name, shots), QUESTIONS, strict=True):
        assert item.pairs == tuple((start + question, choice) for choice in choices)


def test_tables_are_asked_about_as_the_harness_does(package):
    harness = pytest.importorskip("lm_eval.tasks.super_glue.copa.utils")
    reviews, causes = load_items("sst2"), load_items("copa")
    question = "Question: Is this sentence positive or negative?\nAnswer:"
    context = f"a fine film . \n{question}"
    assert reviews[0] == Item(((context, " negative"), (context, " positive")), 1)
    for row, item in enumerate(causes):
        doc = {name: values[row] for name, values in toy_package.COPA.items()}
        choices = harness.doc_to_choice(doc)
        assert item.pairs == tuple((harness.doc_to_text(doc), f" {choice}") for choice in choices)
        assert choices[item.gold] == harness.doc_to_target(doc)


def test_metrics_by_hand():
    def item(*texts, gold):
        return Item(tuple(("x", text) for text in texts), gold)

    items = [item(" a", " bcde", gold=1), item(" é", " b", gold=0), item(" a", " b", gold=1)]
    sums = [(-1.0, -2.0), (-1.0, -3.0), (-1.0, -4.0)]
    found = summarize(items, [[Likelihood(s, False) for s in pair] for pair in sums])
    assert found["accuracy"] == pytest.approx(1 / 3)  # Only é.
    assert found["accuracy_norm"] == pytest.approx(2 / 3)  # And bcde: -2 / 4 > -1 / 1.
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert found["bits_per_byte"] == pytest.approx((2 + 1 + 4) / math.log(2) / (5 + 3 + 2))
    assert "perplexity" not in found
    words = [item(" a", gold=0), item(" bc", gold=0)]
    found = summarize(words, [[Likelihood(-1.0, True)], [Likelihood(-2.0, False)]], word=True)
    assert found["accuracy"] == 0.5 and found["perplexity"] == pytest.approx(math.exp(1.5))
    assert "accuracy_norm" not in found
    (one,) = [summarize(words[:1], [[Likelihood(-1.0, True)]], word=True)]
    assert one["accuracy"] == 1 and "accuracy_stderr" not in one


@pytest.mark.slow
def test_a_run_over_tasks(package, loaded):
    lines = []
    found = run_tasks(loaded, ["hellaswag", "lambada"], batch_size=4, echo=lines.append)
    pairs = [(context, text) for context, texts, _ in QUESTIONS for text in texts]
    sums = [score.sum for score in loglikelihood(loaded, pairs, batch_size=4)]
    right = [np.argmax(sums[0:2]) == 0, np.argmax(sums[2:5]) == 2, np.argmax(sums[5:7]) == 0]
    assert found["hellaswag"]["accuracy"] == np.mean(right)
    assert found["hellaswag"]["requests"] == 7 and found["hellaswag"]["items"] == 3
    assert found["hellaswag"]["too_long"] == 0
    nats = [-score.sum for score in loglikelihood(loaded, WORDS)]
    assert found["lambada"]["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert [line.split()[0] for line in lines] == ["task", "hellaswag", "lambada"]
    assert lines[2] == line_of("lambada", found["lambada"])
    tokens = sum(
        len(loaded.tokenizer.encode(context + continuation)) + 1 for context, continuation in WORDS
    )
    assert found["lambada"]["tokens"] == tokens
    assert found["lambada"]["tokens_per_second"] * found["lambada"]["seconds"] == pytest.approx(
        tokens
    )


def test_what_is_too_long_is_counted_and_said(package, loaded):
    lines = []
    found = run_tasks(loaded, ["arc_easy"], shots=5, echo=lines.append)
    assert found["arc_easy"]["too_long"] == found["arc_easy"]["requests"] == 7
    assert "7 requests of arc_easy are longer than the model's 64 positions" in lines[-1]


def test_bad_input_is_named(package, loaded, monkeypatch, tmp_path):
    def run(names, **options):
        return run_tasks(loaded, names, echo=lambda line: pytest.fail("it began"), **options)

    with pytest.raises(ValueError, match=r"no task 'arc_eazy': did you mean 'arc_easy'\?"):
        run(["lambada", "arc_eazy"])
    with pytest.raises(ValueError, match="name at least one task"):
        run([])
    with pytest.raises(ValueError, match="a limit of 0"):
        run(["lambada"], limit=0)
    with pytest.raises(ValueError, match=r"no examples for lambada, and 2 .* --num-fewshot 0, or"):
        run(["lambada"], shots=2)
    with pytest.raises(ValueError, match=r"up to 5 examples for piqa, and 6 .*0 or 5"):
        run(["piqa"], shots=6)
    with pytest.raises(ValueError, match="-1 were asked for"):
        run(["piqa"], shots=-1)
    with pytest.raises(ValueError, match="1 request or more, not 0"):
        run(["piqa"], batch_size=0)
    bare = SimpleNamespace(model=loaded.model, tokenizer=None, name="out/model")
    with pytest.raises(ValueError, match=r"out/model has no tokenizer"):
        run_tasks(bare, ["lambada"])
    both_ways = FAMILIES["bert"].build(**FAMILIES["bert"].tiny)
    with pytest.raises(ValueError, match="bidirectional"):
        run_tasks(dataclasses.replace(loaded, model=both_ways), ["lambada"])
    real = builtins.__import__

    def without_pyarrow(name, *rest, **options):
        if name == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ValueError, match=r"pip install 'lm\[eval\]'"):
        run(["sst2"])


def test_a_missing_package_says_what_to_do(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ValueError, match=f"put the file {PACKAGE.filename} into"):
        run_tasks(loaded, ["lambada"])


def test_results_are_written_whole(tmp_path):
    path = write_evaluation(tmp_path, "a", {"lambada": {"accuracy": 0.5}})
    write_evaluation(tmp_path, "b", {"piqa": {"accuracy": 0.25}})
    assert json.loads(path.read_text()) == {"model": "b", "tasks": {"piqa": {"accuracy": 0.25}}}
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_names_are_taken_once():
    assert check_request(["piqa", "lambada", "piqa"], 0, None) == ["piqa", "lambada"]
    assert list(TASKS) == list(COUNTS)


@pytest.mark.slow
def test_the_package_has_what_is_said():
    """The questions of all benchmarks, counted; those with examples ask the same."""
    assert {name: len(load_items(name)) for name in COUNTS} == COUNTS
    for name in ("hellaswag", "piqa", "winogrande", "boolq"):
        bare, two = load_items(name), load_items(name, 2)
        assert [item.gold for item in bare] == [item.gold for item in two]
        start = os.path.commonprefix([item.pairs[0][0] for item in two])  # noqa: RUF071
        start = start[: start.rindex(BETWEEN) + len(BETWEEN)]
        assert start.count(BETWEEN) == 2
        for with_none, with_two in zip(bare, two):
            contexts = [(start + context, text) for context, text in with_none.pairs]
            assert with_two.pairs == tuple(contexts)
    for name in COUNTS:
        for item in load_items(name):
            assert 0 <= item.gold < len(item.pairs)
            assert all(context == context.rstrip() for context, _ in item.pairs)
